"""Rotary frequencies of a layer, for each kind of rotary positions, and what comes with them.

Source: Su et al., RoFormer (arXiv 2104.09864); Peng et al., YaRN (arXiv 2309.00071); the kinds are
those of `modeling_rope_utils` in transformers, and the scale by position is that of its
`modeling_ministral3`. The tests hold these against their results.
"""

from __future__ import annotations

import math

import torch

from dattn_mcore.architectures.sizes import NOT_ROTATED, RopeConfig


def rotary_frequencies(head_dim: int, base: float, rope: RopeConfig) -> torch.Tensor:
    """Angles per position, float32 [head_dim / 2].

    Args:
        head_dim: size of a head; even.
        base: RoPE theta.
        rope: how frequencies are stretched.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = base**-exponent
    if rope == NOT_ROTATED:
        return torch.zeros_like(frequencies)  # all rows at one position: a rotation by 0, exactly
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3(frequencies, rope)
    return _yarn(frequencies, base, rope) if rope.kind == "yarn" else frequencies


def query_factor(
    positions: torch.Tensor, rope: RopeConfig, dtype: torch.dtype = torch.float32
) -> torch.Tensor | None:
    """What queries are multiplied by where they are rotated.

    YaRN scales rotated queries and rotated keys by the same factor; both are put on the queries
    here, which gives the same logits and leaves the keys alone. A query or key that is not rotated
    (text that looks at visual rows without positions) is not scaled either.

    Args:
        positions: int64 [n], of the rows.
        rope: how their positions are stretched.
        dtype: of the result.

    Returns:
        [n, 1, 1, 1], as angles are; None for 1.
    """
    if rope.kind != "yarn" or (rope.attention_factor == 1 and rope.query_scale_beta == 0):
        return None
    lengths = torch.div(positions, rope.original_length, rounding_mode="floor").to(dtype)
    scale = 1 + rope.query_scale_beta * torch.log1p(lengths)
    return (rope.attention_factor**2 * scale)[:, None, None, None]


def _llama3(frequencies: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Short waves stay, long ones are divided, those in between are blended."""
    wave_length = 2 * math.pi / frequencies
    low, high = rope.low_frequency_factor, rope.high_frequency_factor
    share = ((rope.original_length / wave_length - low) / (high - low)).clamp(0, 1)
    return (1 - share) * frequencies / rope.factor + share * frequencies


def _yarn(frequencies: torch.Tensor, base: float, rope: RopeConfig) -> torch.Tensor:
    """Fast waves stay, slow ones are divided, those in between are blended."""
    head_dim = 2 * len(frequencies)

    def place(turns: float) -> float:
        """Among the frequencies, the one of so many turns within the original length."""
        waves = rope.original_length / (2 * math.pi * turns)
        return head_dim * math.log(waves) / (2 * math.log(base))

    first, last = place(rope.beta_fast), place(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    # Transformers bounds by the head's size, although there are half as many frequencies.
    first, last = max(first, 0), min(last, head_dim - 1)
    width = last - first or 0.001
    share = ((torch.arange(len(frequencies), dtype=torch.float32) - first) / width).clamp(0, 1)
    return share * frequencies / rope.factor + (1 - share) * frequencies
