"""Mistral 7B.

Sources: `MistralConfig` and `modeling_mistral` of transformers; mistral-common for the template.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dattn_mcore.architectures.chat import BOS, EOS, ChatTemplate, Text, Token
from dattn_mcore.architectures.features import TextFeatures
from dattn_mcore.architectures.records import (
    Breach,
    HfConfig,
    LanguageModel,
    Unsupported,
    default_rope,
)
from dattn_mcore.architectures.sizes import LlmConfig

FEATURES = TextFeatures()
# <bos> then, per pair of turns:  <[INST]> " u" <[/INST]> {" a" <eos>}
CHAT = ChatTemplate(
    name="mistral",
    begin=(Token(BOS),),
    user=(Token("[INST]"), Text(before=" ", holds="said"), Token("[/INST]")),
    answer=(
        Text(before=" ", holds="said", supervised=True),
        Token(EOS, supervised=True),
    ),
    stop=Token(EOS),
)


def breaches(llm: LlmConfig) -> Iterator[Breach]:
    """Sizes that `MistralConfig` cannot hold."""
    if llm.attention_softcap is not None:
        yield Breach("attention_softcap", "attention_softcap=null")
    if llm.final_softcap is not None:
        yield Breach("final_softcap", "final_softcap=null")
    if llm.query_scale not in (None, llm.head_dim):
        yield Breach("query_scale", f"query_scale=null or head_dim ({llm.head_dim})")
    if len(set(llm.windows)) > 1:
        yield Breach("layer_pattern", "the same window in all layers (layer_pattern=[])")


def to_hf(llm: LlmConfig) -> dict[str, Any]:
    """Fields of `MistralConfig`."""
    return {
        "rope_parameters": {"rope_type": "default", "rope_theta": llm.rotary_base},
        "sliding_window": llm.window_of(0),
    }


def from_hf(config: HfConfig) -> dict[str, Any]:
    """Values of `LlmConfig`."""
    if config.hidden_act != "silu":
        raise Unsupported(f"hidden_act is {config.hidden_act!r}; it must be 'silu'")
    if getattr(config, "attention_bias", False):
        raise Unsupported("attention_bias is true; only false can be trained")
    return {
        "rotary_base": default_rope(config),
        "sliding_window": config.sliding_window,
    }


ARCHITECTURE = LanguageModel(
    name="mistral",
    title="Mistral",
    model_type="mistral",
    features=FEATURES,
    chat=CHAT,
    breaches=breaches,
    to_hf=to_hf,
    from_hf=from_hf,
    max_positions=32768,
)
