"""Rotary position embedding of packed rows (GPT-NeoX style, as Megatron-Core's)."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rotary:
    """Angles of the rows of a pack.

    Attributes:
        text: [T, 1, 1, head_dim] float32 angles.
        visual: [V, 1, 1, head_dim], angles of visual rows on the axis of the mode.
    """

    text: torch.Tensor
    visual: torch.Tensor


def rotate(rows: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotates rows [n, heads, head_dim] by angles [n, 1, 1, head_dim].

    The bits are those of Megatron-Core's `apply_rotary_pos_emb` without fusion, which asks for a
    `TransformerConfig` and for initialised process groups (a test compares the two).
    """
    cosine, sine = angles.cos().to(rows.dtype), angles.sin().to(rows.dtype)
    # One edge of the graph leads back to `rows`: both terms' gradients meet before any other's.
    rows = rows.unsqueeze(1)
    first, second = rows.chunk(2, dim=-1)
    return (rows * cosine + torch.cat([-second, first], dim=-1) * sine).squeeze(1)


def rotary_angles(positions: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    """Angles [n, 1, 1, head_dim] of positions [n]; the two halves are alike (GPT-NeoX style)."""
    angles = torch.outer(positions.to(inv_freq.dtype), inv_freq)
    return torch.cat([angles, angles], dim=-1)[:, None, None, :]
