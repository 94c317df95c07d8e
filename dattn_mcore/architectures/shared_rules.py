"""What several families have in common: what their configurations cannot hold, or must say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dattn_mcore.architectures.records import Breach, HfConfig, Unsupported
from dattn_mcore.architectures.sizes import LlmConfig

WINDOWS = ("sliding_window", "layer_pattern")  # fields of `LlmConfig`
CAPS = ("attention_softcap", "final_softcap", "query_scale")


def whole_heads(llm: LlmConfig) -> Iterator[Breach]:
    """The width is a multiple of the heads, although a head may be of another size."""
    if llm.num_attention_heads > 0 and llm.hidden_size % llm.num_attention_heads:
        heads = f"a multiple of num_attention_heads={llm.num_attention_heads} as hidden_size"
        yield Breach("hidden_size", heads)


def whole_scale(llm: LlmConfig) -> Iterator[Breach]:
    """The query scale is a whole number."""
    if llm.query_scale is not None and not float(llm.query_scale).is_integer():
        yield Breach("query_scale", "a whole number as query_scale")


def one_window(llm: LlmConfig) -> Iterator[Breach]:
    """All layers have the same window."""
    if len(set(llm.windows)) > 1:
        yield Breach("layer_pattern", "the same window in all layers (layer_pattern=[])")


def rope_kinds(llm: LlmConfig, kinds: tuple[str, ...]) -> Iterator[Breach]:
    """Rotary positions are stretched in one of the given ways."""
    if llm.rope.kind not in kinds:
        yield Breach("rope", f"rope.kind={' or '.join(kinds)}")


def caps_to_hf(llm: LlmConfig) -> dict[str, Any]:
    """Caps of the logits, and the softmax scale, which is a whole number's."""
    return {
        "query_pre_attn_scalar": int(llm.query_scale or llm.head_dim),
        "attn_logit_softcapping": llm.attention_softcap,
        "final_logit_softcapping": llm.final_softcap,
    }


def caps_from_hf(config: HfConfig) -> dict[str, Any]:
    """Values of `LlmConfig` for the fields of `caps_to_hf`."""
    return {
        "query_scale": float(config.query_pre_attn_scalar),
        "attention_softcap": config.attn_logit_softcapping,
        "final_softcap": config.final_logit_softcapping,
    }


def check_stated(config: HfConfig, **expected: object) -> None:
    """Checks settings of a Hugging Face configuration that cannot be trained otherwise.

    Raises:
        Unsupported: one is another; one that the configuration lacks is as expected.
    """
    for name, value in expected.items():
        found = getattr(config, name, value)
        unset = found is None and value is False  # as releases before have written it
        if found != value and not unset:
            raise Unsupported(f"{name} is {found!r}; it must be {value!r}")
