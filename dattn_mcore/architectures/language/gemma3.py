"""Gemma 3, its text part.

Sources: `Gemma3TextConfig` and `modeling_gemma3` of transformers; the chat template of the
published models, which puts a system message in front of the first user's text.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dattn_mcore.architectures.features import SANDWICH_NORMS, TextFeatures
from dattn_mcore.architectures.language.gemma2 import CHAT
from dattn_mcore.architectures.layer_types import windows_from_hf, windows_to_hf
from dattn_mcore.architectures.records import Breach, HfConfig, LanguageModel
from dattn_mcore.architectures.rope import rope_from_hf, rope_to_hf
from dattn_mcore.architectures.shared_rules import (
    CAPS,
    WINDOWS,
    caps_from_hf,
    caps_to_hf,
    check_stated,
    rope_kinds,
    whole_heads,
    whole_scale,
)
from dattn_mcore.architectures.sizes import LlmConfig, RopeConfig

KINDS = ("default", "linear")


def breaches(llm: LlmConfig) -> Iterator[Breach]:
    """Values that `Gemma3TextConfig` cannot hold."""
    yield from whole_scale(llm)
    yield from whole_heads(llm)
    yield from rope_kinds(llm, KINDS)


def to_hf(llm: LlmConfig) -> dict[str, Any]:
    """Fields of `Gemma3TextConfig`."""
    local = rope_to_hf(llm.rotary_base, llm.rope)
    if llm.sliding_rotary_base is not None:
        local = rope_to_hf(llm.sliding_rotary_base, RopeConfig())
    return {
        "rope_parameters": {
            "full_attention": rope_to_hf(llm.rotary_base, llm.rope),
            "sliding_attention": local,
        },
        **windows_to_hf(llm),
        **caps_to_hf(llm),
    }


def from_hf(config: HfConfig) -> dict[str, Any]:
    """Values of `LlmConfig`."""
    check_stated(
        config,
        hidden_activation="gelu_pytorch_tanh",
        attention_bias=False,
        use_bidirectional_attention=False,
    )
    base, rope = rope_from_hf(config.rope_parameters["full_attention"], KINDS)
    local_base, local_rope = rope_from_hf(config.rope_parameters["sliding_attention"], KINDS)
    windows = windows_from_hf(config)
    local: float | None = None
    if windows["sliding_window"] is not None and (local_base, local_rope) != (base, rope):
        check_stated(local_rope, kind="default")
        local = local_base
    return {
        "rotary_base": base,
        "rope": rope,
        "sliding_rotary_base": local,
        **windows,
        **caps_from_hf(config),
    }


ARCHITECTURE = LanguageModel(
    name="gemma3",
    title="Gemma 3",
    model_type="gemma3_text",
    features=TextFeatures(
        activation="gelu_tanh",
        norms=SANDWICH_NORMS,
        zero_centered_gamma=True,
        scale_embeddings=True,
        qk_norm=("head_dim",),
    ),
    chat=CHAT,
    to_hf=to_hf,
    from_hf=from_hf,
    max_positions=131072,
    holds=(*CAPS, *WINDOWS, "rope", "sliding_rotary_base"),
    breaches=breaches,
)
