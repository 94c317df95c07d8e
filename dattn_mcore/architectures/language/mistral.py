"""Mistral 7B.

Sources: `MistralConfig` and `modeling_mistral` of transformers; mistral-common for the template.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dattn_mcore.architectures.chat import BOS, EOS, ChatTemplate, Text, Token
from dattn_mcore.architectures.features import TextFeatures
from dattn_mcore.architectures.records import Breach, HfConfig, LanguageModel
from dattn_mcore.architectures.rope import one_rope_from_hf, one_rope_to_hf
from dattn_mcore.architectures.shared_rules import WINDOWS, check_stated, one_window
from dattn_mcore.architectures.sizes import LlmConfig

# <bos> then, per pair of turns:  <[INST]> " u" <[/INST]> {" a" <eos>}
# Mistral's own template of v0.3 puts a system message into the last turn if that is a user's, which
# no answer but the last could have seen.
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
    """Values that `MistralConfig` cannot hold."""
    yield from one_window(llm)


def to_hf(llm: LlmConfig) -> dict[str, Any]:
    """Fields of `MistralConfig`."""
    return {**one_rope_to_hf(llm), "sliding_window": llm.window_of(0)}


def from_hf(config: HfConfig) -> dict[str, Any]:
    """Values of `LlmConfig`."""
    check_stated(config, hidden_act="silu", attention_bias=False)
    return {**one_rope_from_hf(config), "sliding_window": config.sliding_window}


ARCHITECTURE = LanguageModel(
    name="mistral",
    title="Mistral",
    model_type="mistral",
    features=TextFeatures(),
    chat=CHAT,
    to_hf=to_hf,
    from_hf=from_hf,
    max_positions=32768,
    holds=WINDOWS,
    breaches=breaches,
)
