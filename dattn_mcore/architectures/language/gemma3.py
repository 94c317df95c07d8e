"""Gemma 3, its text part.

Sources: `Gemma3TextConfig` and `modeling_gemma3` of transformers; the chat template of the
published models, which puts a system message in front of the first user's text.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dattn_mcore.architectures.features import TextFeatures
from dattn_mcore.architectures.language.gemma2 import CHAT
from dattn_mcore.architectures.layer_types import layer_types, windows_from
from dattn_mcore.architectures.records import Breach, HfConfig, LanguageModel
from dattn_mcore.architectures.rope import rope_from_hf, rope_to_hf
from dattn_mcore.architectures.shared_rules import check_stated, whole_heads, whole_scale
from dattn_mcore.architectures.sizes import LlmConfig, RopeConfig

KINDS = ("default", "linear")


def breaches(llm: LlmConfig) -> Iterator[Breach]:
    """Sizes that `Gemma3TextConfig` cannot hold."""
    yield from whole_scale(llm)
    yield from whole_heads(llm)
    if llm.rope.kind not in KINDS:
        yield Breach("rope", f"rope.kind={' or '.join(KINDS)}")


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
        "sliding_window": llm.sliding_window,
        "layer_types": layer_types(llm),
        "query_pre_attn_scalar": int(llm.query_scale or llm.head_dim),
        "attn_logit_softcapping": llm.attention_softcap,
        "final_logit_softcapping": llm.final_softcap,
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
    windows = windows_from(config.layer_types, config.sliding_window)
    local: float | None = None
    if windows["sliding_window"] is not None and (local_base, local_rope) != (base, rope):
        check_stated(local_rope, kind="default")
        local = local_base
    return {
        "rotary_base": base,
        "rope": rope,
        "sliding_rotary_base": local,
        **windows,
        "query_scale": float(config.query_pre_attn_scalar),
        "attention_softcap": config.attn_logit_softcapping,
        "final_softcap": config.final_logit_softcapping,
    }


ARCHITECTURE = LanguageModel(
    name="gemma3",
    title="Gemma 3",
    model_type="gemma3_text",
    features=TextFeatures(
        activation="gelu_tanh",
        norms="sandwich",
        zero_centered_gamma=True,
        scale_embeddings=True,
        qk_norm=True,
    ),
    chat=CHAT,
    breaches=breaches,
    to_hf=to_hf,
    from_hf=from_hf,
    max_positions=131072,
)
