"""Rotary frequencies of a layer, for each kind of rotary positions.

Source: Su et al., RoFormer (arXiv 2104.09864); the kinds are those of `modeling_rope_utils` in
transformers, whose results the tests hold these against.
"""

from __future__ import annotations

import math

import torch

from dattn_mcore.architectures.sizes import RopeConfig


def rotary_frequencies(head_dim: int, base: float, rope: RopeConfig) -> torch.Tensor:
    """Angles per position, float32 [head_dim / 2].

    Args:
        head_dim: size of a head; even.
        base: RoPE theta.
        rope: how frequencies are stretched.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = base**-exponent
    if rope.kind == "linear":
        return frequencies / rope.factor
    return _llama3(frequencies, rope) if rope.kind == "llama3" else frequencies


def _llama3(frequencies: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Short waves stay, long ones are divided, those in between are blended."""
    wave_length = 2 * math.pi / frequencies
    low, high = rope.low_frequency_factor, rope.high_frequency_factor
    share = ((rope.original_length / wave_length - low) / (high - low)).clamp(0, 1)
    return (1 - share) * frequencies / rope.factor + share * frequencies
