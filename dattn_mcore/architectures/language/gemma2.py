"""Gemma 2.

Source: `Gemma2Config` and `modeling_gemma2` of transformers; the chat template of the published
models. Gammas are zero-centred on both sides.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dattn_mcore.architectures.chat import BOS, ChatTemplate, Text, Token
from dattn_mcore.architectures.features import TextFeatures
from dattn_mcore.architectures.layer_types import layer_types, windows_from
from dattn_mcore.architectures.records import Breach, HfConfig, LanguageModel
from dattn_mcore.architectures.rope import rope_from_hf, rope_to_hf
from dattn_mcore.architectures.shared_rules import check_stated, one_rope, whole_heads, whole_scale
from dattn_mcore.architectures.sizes import LlmConfig

FEATURES = TextFeatures(
    activation="gelu_tanh", norms="sandwich", zero_centered_gamma=True, scale_embeddings=True
)
# <bos> then, per pair of turns:
#   <start_of_turn> "user\nu" <end_of_turn> "\n" <start_of_turn> "model\n" {"a" <end_of_turn>} "\n"
CHAT = ChatTemplate(
    name="gemma",
    begin=(Token(BOS),),
    user=(
        Token("<start_of_turn>"),
        Text(before="user\n", holds="said"),
        Token("<end_of_turn>"),
        Text("\n"),
        Token("<start_of_turn>"),
        Text("model\n"),
    ),
    answer=(
        Text(holds="said", supervised=True),
        Token("<end_of_turn>", supervised=True),
        Text("\n"),
    ),
    stop=Token("<end_of_turn>"),
)


def breaches(llm: LlmConfig) -> Iterator[Breach]:
    """Sizes that `Gemma2Config` cannot hold."""
    yield from one_rope(llm)
    yield from whole_scale(llm)
    yield from whole_heads(llm)


def to_hf(llm: LlmConfig) -> dict[str, Any]:
    """Fields of `Gemma2Config`."""
    return {
        "rope_parameters": rope_to_hf(llm.rotary_base, llm.rope),
        "sliding_window": llm.sliding_window,
        "layer_types": layer_types(llm),
        "query_pre_attn_scalar": int(llm.query_scale or llm.head_dim),
        "attn_logit_softcapping": llm.attention_softcap,
        "final_logit_softcapping": llm.final_softcap,
    }


def from_hf(config: HfConfig) -> dict[str, Any]:
    """Values of `LlmConfig`."""
    check_stated(config, hidden_activation="gelu_pytorch_tanh", attention_bias=False)
    base, rope = rope_from_hf(config.rope_parameters)
    return {
        "rotary_base": base,
        "rope": rope,
        **windows_from(config.layer_types, config.sliding_window),
        "query_scale": float(config.query_pre_attn_scalar),
        "attention_softcap": config.attn_logit_softcapping,
        "final_softcap": config.final_logit_softcapping,
    }


ARCHITECTURE = LanguageModel(
    name="gemma2",
    title="Gemma 2",
    model_type="gemma2",
    features=FEATURES,
    chat=CHAT,
    breaches=breaches,
    to_hf=to_hf,
    from_hf=from_hf,
    max_positions=8192,
)
