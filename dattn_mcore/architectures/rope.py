"""Rotary positions as Hugging Face writes them (`rope_parameters`), and as sizes have them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dattn_mcore.architectures.records import HfConfig, Unsupported
from dattn_mcore.architectures.sizes import LlmConfig, RopeConfig


def rope_to_hf(base: float, rope: RopeConfig) -> dict[str, Any]:
    """`rope_parameters` of one kind of layer."""
    fields: dict[str, Any] = {"rope_type": rope.kind, "rope_theta": base}
    if rope.kind != "default":
        fields["factor"] = rope.factor
    if rope.kind == "llama3":
        fields |= {
            "original_max_position_embeddings": rope.original_length,
            "low_freq_factor": rope.low_frequency_factor,
            "high_freq_factor": rope.high_frequency_factor,
        }
    elif rope.kind == "yarn":
        fields |= {
            "original_max_position_embeddings": rope.original_length,
            "beta_slow": rope.beta_slow,
            "beta_fast": rope.beta_fast,
            "truncate": rope.truncate,
            "attention_factor": rope.attention_factor,
        }
    return fields


def rope_from_hf(
    fields: Mapping[str, Any], kinds: Sequence[str] = ("default",)
) -> tuple[float, RopeConfig]:
    """Rotary base, and how frequencies are stretched.

    Args:
        fields: `rope_parameters` of one kind of layer.
        kinds: those that the family has.

    Raises:
        Unsupported: they are of another kind.
    """
    kind = fields["rope_type"]
    if kind not in kinds:
        raise Unsupported(
            f"rope_type is {kind!r}; only {' and '.join(map(repr, kinds))} can be trained"
        )
    share = fields.get("partial_rotary_factor")
    if share not in (None, 1.0):
        raise Unsupported(f"partial_rotary_factor is {share}; only 1.0 can be trained")
    rope = RopeConfig()
    if kind == "linear":
        rope = RopeConfig(kind=kind, factor=float(fields["factor"]))
    elif kind == "llama3":
        rope = RopeConfig(
            kind=kind,
            factor=float(fields["factor"]),
            original_length=int(fields["original_max_position_embeddings"]),
            low_frequency_factor=float(fields["low_freq_factor"]),
            high_frequency_factor=float(fields["high_freq_factor"]),
        )
    elif kind == "yarn":
        rope = _yarn_from_hf(fields)
    return float(fields["rope_theta"]), rope


def _yarn_from_hf(fields: Mapping[str, Any]) -> RopeConfig:
    """Source: `_compute_yarn_parameters` of transformers, where what is not given is as here.

    Raises:
        Unsupported: the factor is left to be worked out of lengths.
    """
    if fields.get("factor") is None:
        raise Unsupported("rope_parameters have no factor; write it there as a number")
    factor = float(fields["factor"])

    def growth(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    attention_factor = fields.get("attention_factor")
    if attention_factor is None:
        scale, scale_all = fields.get("mscale") or 0, fields.get("mscale_all_dim") or 0
        both = scale != 0 and scale_all != 0
        attention_factor = growth(scale) / growth(scale_all) if both else growth(1.0)
    truncate = fields.get("truncate")
    return RopeConfig(
        kind="yarn",
        factor=factor,
        original_length=int(fields["original_max_position_embeddings"]),
        beta_slow=float(fields.get("beta_slow") or 1),
        beta_fast=float(fields.get("beta_fast") or 32),
        truncate=True if truncate is None else bool(truncate),
        attention_factor=float(attention_factor),
    )


def one_rope_to_hf(llm: LlmConfig) -> dict[str, Any]:
    """Fields of a Hugging Face configuration whose layers have the same rotary positions."""
    return {"rope_parameters": rope_to_hf(llm.rotary_base, llm.rope)}


def one_rope_from_hf(config: HfConfig, kinds: Sequence[str] = ("default",)) -> dict[str, Any]:
    """Values of `LlmConfig`.

    Raises:
        Unsupported: the positions are of another kind.
    """
    base, rope = rope_from_hf(config.rope_parameters, kinds)
    return {"rotary_base": base, "rope": rope}
