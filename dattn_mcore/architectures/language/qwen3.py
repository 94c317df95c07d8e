"""Qwen3 (dense models of text).

Sources: `Qwen3Config` and `modeling_qwen3` of transformers; the chat template of the published
models.
"""

from __future__ import annotations

from typing import Any

from dattn_mcore.architectures.chat import HERMES, Text, Token, chatml
from dattn_mcore.architectures.features import TextFeatures
from dattn_mcore.architectures.layer_types import switched_windows_to_hf, windows_from_hf
from dattn_mcore.architectures.records import HfConfig, LanguageModel
from dattn_mcore.architectures.rope import one_rope_from_hf, one_rope_to_hf
from dattn_mcore.architectures.shared_rules import WINDOWS, check_stated
from dattn_mcore.architectures.sizes import LlmConfig

# The template of Qwen3's models, thinking switched off: the last answer, or where it is asked for,
# stands behind an empty thought. Earlier answers have lost theirs, as in Qwen's own template.
CHAT = chatml(
    "qwen3",
    before_last_answer=(Token("<think>"), Text("\n\n"), Token("</think>"), Text("\n\n")),
    tools=HERMES,
)


def to_hf(llm: LlmConfig) -> dict[str, Any]:
    """Fields of `Qwen3Config`."""
    return {**one_rope_to_hf(llm), **switched_windows_to_hf(llm)}


def from_hf(config: HfConfig) -> dict[str, Any]:
    """Values of `LlmConfig`."""
    check_stated(config, hidden_act="silu", attention_bias=False)
    return {**one_rope_from_hf(config), **windows_from_hf(config)}


ARCHITECTURE = LanguageModel(
    name="qwen3",
    title="Qwen3",
    model_type="qwen3",
    features=TextFeatures(qk_norm=("head_dim",)),
    chat=CHAT,
    to_hf=to_hf,
    from_hf=from_hf,
    max_positions=40960,
    holds=WINDOWS,
)
