"""Norms of queries and keys, before they are rotated: of each head, or of all heads together.

Heads are shared over the tensor parallel group. What is normed together is summed over it: one
number a row, in float32, forward and backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import nn

from dattn_mcore.architectures.features import HeadAxis


def build_qk_norm(
    axes: Sequence[HeadAxis],
    head_norm: ModuleSpec | type | None,
    *,
    config: TransformerConfig,
    heads: int,
    tp_group: torch.distributed.ProcessGroup,
) -> nn.Module | None:
    """The norm of a layer's queries or keys; None where they are not normed.

    It takes [rows, heads of this rank, head_dim] and returns the same shape.

    Args:
        axes: which of `heads` and `head_dim` are normed together; none: there is no norm.
        head_norm: norm of the last axis, whose weight every rank holds.
        config: Megatron-Core's layer configuration.
        heads: of the whole layer, query heads or key/value heads.
        tp_group: ranks that share the heads.
    """
    if not axes:
        return None
    if "heads" in axes:
        assert "head_dim" in axes, "a norm over heads alone is not implemented"
        return AllHeadsNorm(config, heads=heads, tp_group=tp_group)
    return build_module(
        head_norm,
        config=config,
        hidden_size=config.kv_channels,
        eps=config.layernorm_epsilon,
    )


class AllHeadsNorm(nn.Module):
    """RMS norm of all heads of a row together, which tensor parallel ranks share.

    The weight [heads * head_dim] is whole on every rank, which uses the part of its own heads;
    Megatron-Core sums its gradients over the ranks. Where there are more ranks than heads (of keys)
    several hold the same head, and each head counts once.

    Args:
        config: `layernorm_zero_centered_gamma` scales by 1 + weight, with weights that start at 0.
        heads: of all ranks.
        tp_group: ranks that share them.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        heads: int,
        tp_group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__()
        ranks = get_pg_size(tp_group)
        self.tp_group, self.eps = tp_group, config.layernorm_epsilon
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.size = heads * config.kv_channels
        self.copies = max(1, ranks // heads)  # ranks that hold the same head
        self.first = get_pg_rank(tp_group) * heads // ranks * config.kv_channels
        start = torch.zeros if self.zero_centered else torch.ones
        self.weight = nn.Parameter(start(self.size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Takes this rank's heads [rows, heads, head_dim]; returns the same shape and dtype."""
        rows = x.flatten(1)
        weight = self.weight[self.first : self.first + rows.shape[1]].float()
        if self.zero_centered:
            weight = 1.0 + weight
        total = self.copies * self.size
        return _AllHeadsNorm.apply(rows, weight, total, self.eps, self.tp_group).view_as(x)


class _AllHeadsNorm(torch.autograd.Function):
    """Keeps its input, and one number a row; `total` numbers of a row are on all ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        total: int,
        eps: float,
        group: torch.distributed.ProcessGroup,
    ) -> torch.Tensor:
        wide = rows.float()
        squares = _over_ranks(torch.linalg.vecdot(wide, wide)[:, None], group)
        scale = (squares / total + eps).rsqrt()
        ctx.save_for_backward(rows, weight, scale)
        ctx.total, ctx.group = total, group
        return (wide * scale * weight).to(rows.dtype)

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        rows, weight, scale = ctx.saved_tensors
        normed, wide = rows.float() * scale, grad.float()
        found_weight = (wide * normed).sum(0)
        wide = wide * weight
        # A rank that holds a copy of a head has the gradients that its own queries bring.
        mean = _over_ranks(torch.linalg.vecdot(wide, normed)[:, None], ctx.group) / ctx.total
        found = ((wide - normed * mean) * scale).to(rows.dtype)
        return found, found_weight, None, None, None


def _over_ranks(x: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """Sums over the ranks of a group, in place."""
    if get_pg_size(group) > 1:
        torch.distributed.all_reduce(x, group=group)
    return x
