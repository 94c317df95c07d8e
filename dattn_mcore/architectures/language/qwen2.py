"""Qwen2.5, and Qwen2 (dense models of text).

Sources: `Qwen2Config` and `modeling_qwen2` of transformers; the chat template of the published
models.
"""

from __future__ import annotations

from typing import Any

from dattn_mcore.architectures.chat import HERMES, chatml
from dattn_mcore.architectures.features import TextFeatures
from dattn_mcore.architectures.layer_types import switched_windows_to_hf, windows_from_hf
from dattn_mcore.architectures.records import HfConfig, LanguageModel
from dattn_mcore.architectures.rope import one_rope_from_hf, one_rope_to_hf
from dattn_mcore.architectures.shared_rules import WINDOWS, check_stated
from dattn_mcore.architectures.sizes import LlmConfig

# The template of Qwen2.5's instruct models. A conversation without a system message gets theirs.
CHAT = chatml(
    "chatml",
    default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    tools=HERMES,
)


def to_hf(llm: LlmConfig) -> dict[str, Any]:
    """Fields of `Qwen2Config`."""
    return {**one_rope_to_hf(llm), **switched_windows_to_hf(llm)}


def from_hf(config: HfConfig) -> dict[str, Any]:
    """Values of `LlmConfig`."""
    check_stated(config, hidden_act="silu")
    return {**one_rope_from_hf(config), **windows_from_hf(config)}


ARCHITECTURE = LanguageModel(
    name="qwen2",
    title="Qwen2.5",
    model_type="qwen2",
    features=TextFeatures(qkv_bias=True),
    chat=CHAT,
    to_hf=to_hf,
    from_hf=from_hf,
    max_positions=32768,
    holds=WINDOWS,
)
