"""Core attention of the vision tower: all patches of a tile see each other, by PyTorch's SDPA."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class BidirectionalAttention(nn.Module):
    """Drop-in for Megatron-Core's `DotProductAttention` without a score matrix or mask.

    Takes the same construction arguments; those that concern causal masks, dropout and context
    parallelism have no meaning here.
    """

    def __init__(self, softmax_scale: float | None = None, **unused: Any) -> None:
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **unused: Any,
    ) -> torch.Tensor:
        """Takes [patches, tiles, heads / tp, head_dim]; returns [patches, tiles, hidden / tp]."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(q, k, v, scale=self.softmax_scale)
        return out.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)
