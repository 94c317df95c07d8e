"""SmolLM3: every fourth layer has no rotary positions.

Sources: `SmolLM3Config` and `modeling_smollm3` of transformers; the chat template of the published
model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from dattn_mcore.architectures.chat import Text, Token, chatml
from dattn_mcore.architectures.features import TextFeatures
from dattn_mcore.architectures.layer_types import shortest_pattern
from dattn_mcore.architectures.records import Breach, HfConfig, LanguageModel
from dattn_mcore.architectures.rope import one_rope_from_hf, one_rope_to_hf
from dattn_mcore.architectures.shared_rules import check_stated, whole_heads
from dattn_mcore.architectures.sizes import LlmConfig

_CHATML = chatml("smollm3")
# ChatML, thinking switched off: every answer, or where it is asked for, stands behind an empty
# thought. A system message is written as it is, as the model's own template does where it holds
# /system_override; the date, cutoff and instructions that it writes otherwise are left out.
CHAT = replace(
    _CHATML,
    user=(*_CHATML.user, Token("<think>"), Text("\n\n"), Token("</think>"), Text("\n")),
)


def breaches(llm: LlmConfig) -> Iterator[Breach]:
    """Values that `SmolLM3Config` cannot hold."""
    yield from whole_heads(llm)


def to_hf(llm: LlmConfig) -> dict[str, Any]:
    """Fields of `SmolLM3Config`."""
    pattern = llm.rotary_pattern or (True,)
    rotated = [int(pattern[layer % len(pattern)]) for layer in range(llm.num_layers)]
    return {**one_rope_to_hf(llm), "no_rope_layers": rotated, "use_sliding_window": False}


def from_hf(config: HfConfig) -> dict[str, Any]:
    """Values of `LlmConfig`."""
    check_stated(
        config, hidden_act="silu", attention_bias=False, mlp_bias=False, use_sliding_window=False
    )
    pattern = shortest_pattern([bool(rotated) for rotated in config.no_rope_layers])
    return {**one_rope_from_hf(config), "rotary_pattern": () if all(pattern) else pattern}


ARCHITECTURE = LanguageModel(
    name="smollm3",
    title="SmolLM3",
    model_type="smollm3",
    features=TextFeatures(),
    chat=CHAT,
    to_hf=to_hf,
    from_hf=from_hf,
    max_positions=65536,
    holds=("rotary_pattern",),
    breaches=breaches,
)
