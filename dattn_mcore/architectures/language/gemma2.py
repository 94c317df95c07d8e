"""Gemma 2.

Source: `Gemma2Config` and `modeling_gemma2` of transformers; the chat template of the published
models. Gammas are zero-centred on both sides.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dattn_mcore.architectures.chat import BOS, ChatTemplate, Text, Token
from dattn_mcore.architectures.features import SANDWICH_NORMS, TextFeatures
from dattn_mcore.architectures.layer_types import windows_from_hf, windows_to_hf
from dattn_mcore.architectures.records import Breach, HfConfig, LanguageModel
from dattn_mcore.architectures.rope import one_rope_from_hf, one_rope_to_hf
from dattn_mcore.architectures.shared_rules import (
    CAPS,
    WINDOWS,
    caps_from_hf,
    caps_to_hf,
    check_stated,
    whole_heads,
    whole_scale,
)
from dattn_mcore.architectures.sizes import LlmConfig

FEATURES = TextFeatures(
    activation="gelu_tanh", norms=SANDWICH_NORMS, zero_centered_gamma=True, scale_embeddings=True
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
    """Values that `Gemma2Config` cannot hold."""
    yield from whole_scale(llm)
    yield from whole_heads(llm)


def to_hf(llm: LlmConfig) -> dict[str, Any]:
    """Fields of `Gemma2Config`."""
    return {**one_rope_to_hf(llm), **windows_to_hf(llm), **caps_to_hf(llm)}


def from_hf(config: HfConfig) -> dict[str, Any]:
    """Values of `LlmConfig`."""
    check_stated(config, hidden_activation="gelu_pytorch_tanh", attention_bias=False)
    return {**one_rope_from_hf(config), **windows_from_hf(config), **caps_from_hf(config)}


ARCHITECTURE = LanguageModel(
    name="gemma2",
    title="Gemma 2",
    model_type="gemma2",
    features=FEATURES,
    chat=CHAT,
    to_hf=to_hf,
    from_hf=from_hf,
    max_positions=8192,
    holds=(*CAPS, *WINDOWS),
    breaches=breaches,
)
