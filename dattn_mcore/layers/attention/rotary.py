"""Rotary position embedding of packed rows (GPT-NeoX style, as Megatron-Core's)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dattn_mcore.architectures.sizes import RopeConfig


@dataclass(frozen=True)
class Rotary:
    """Rotary positions of the rows of a pack, in one layer.

    Attributes:
        text: [T, 1, 1, head_dim] float32 angles.
        visual: [V, 1, 1, head_dim], angles of visual rows on the axis of the mode.
        rope: how positions are stretched, which may scale rotated queries.
    """

    text: torch.Tensor
    visual: torch.Tensor
    rope: RopeConfig = RopeConfig()


def rotate(
    rows: torch.Tensor, angles: torch.Tensor, factor: torch.Tensor | None = None
) -> torch.Tensor:
    """Rotates rows [n, heads, head_dim] by angles [n, 1, 1, head_dim].

    The bits are those of Megatron-Core's `apply_rotary_pos_emb` without fusion, which asks for a
    `TransformerConfig` and for initialised process groups (a test compares the two).

    Args:
        rows: see above.
        angles: see above.
        factor: multiplies the rows, [n, 1, 1, 1]; None for 1.
    """
    cosine, sine = angles.cos(), angles.sin()
    if factor is not None:
        cosine, sine = cosine * factor, sine * factor
    cosine, sine = cosine.to(rows.dtype), sine.to(rows.dtype)
    # One edge of the graph leads back to `rows`: both terms' gradients meet before any other's.
    rows = rows.unsqueeze(1)
    first, second = rows.chunk(2, dim=-1)
    return (rows * cosine + torch.cat([-second, first], dim=-1) * sine).squeeze(1)


def rotary_angles(positions: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    """Angles [n, 1, 1, head_dim] of positions [n]; the two halves are alike (GPT-NeoX style)."""
    angles = torch.outer(positions.to(inv_freq.dtype), inv_freq)
    return torch.cat([angles, angles], dim=-1)[:, None, None, :]
