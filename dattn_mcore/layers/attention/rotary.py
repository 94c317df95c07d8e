"""Rotary position embedding of packed rows, by Megatron-Core's own functions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd


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
    """Rotates rows [n, heads, head_dim] by angles [n, 1, 1, head_dim]."""
    return _apply_rotary_pos_emb_bshd(rows.unsqueeze(1), angles).squeeze(1)


def rotary_angles(positions: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    """Angles [n, 1, 1, head_dim] of positions [n]; the two halves are alike (GPT-NeoX style)."""
    angles = torch.outer(positions.to(inv_freq.dtype), inv_freq)
    return torch.cat([angles, angles], dim=-1)[:, None, None, :]
