"""Row-parallel projections: folded for visual rows, or followed by a norm."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import RowParallelLinear

from dattn_mcore.layers.layout import interleave_shards
from dattn_mcore.layers.norm import Norm


def fold(weight: torch.Tensor, groups: int, head_dim: int) -> torch.Tensor:
    """Sums an output projection's columns over the query heads of each group.

    A visual row's attention output repeats its value over the query heads of a group, so
    `weight @ repeat(value) == fold(weight) @ value`, exactly.

    Args:
        weight: [hidden, heads * head_dim], heads of a group side by side.
        groups: key/value heads.
        head_dim: size of a head.

    Returns:
        [hidden, groups * head_dim], in the weight's dtype.
    """
    return weight.view(weight.shape[0], groups, -1, head_dim).sum(2).flatten(1)


class _FoldedProjection(torch.autograd.Function):
    """`[values @ fold(W)^T; rows @ W^T]`; folds again in backward rather than keep fold(W)."""

    @staticmethod
    def forward(ctx, rows, values, weight, head_dim):
        ctx.num_visual, ctx.head_dim = values.shape[0], head_dim
        ctx.groups = values.shape[1] // head_dim
        kept = (rows, values) if weight.requires_grad else (None, None)
        ctx.save_for_backward(*kept, weight)
        out = rows.new_empty(values.shape[0] + rows.shape[0], weight.shape[0])
        folded = fold(weight, ctx.groups, head_dim)
        torch.mm(values, folded.t(), out=out[: ctx.num_visual])
        torch.mm(rows, weight.t(), out=out[ctx.num_visual :])
        return out

    @staticmethod
    def backward(ctx, grad):
        rows, values, weight = ctx.saved_tensors
        d_visual, d_text = grad[: ctx.num_visual], grad[ctx.num_visual :]
        d_rows = d_values = d_weight = None
        if ctx.needs_input_grad[0]:
            d_rows = d_text @ weight
        if ctx.needs_input_grad[1]:
            d_values = d_visual @ fold(weight, ctx.groups, ctx.head_dim)
        if ctx.needs_input_grad[2]:
            d_weight = d_text.t() @ rows
            d_folded = d_visual.t() @ values
            by_group = d_weight.view(weight.shape[0], ctx.groups, -1, ctx.head_dim)
            by_group += d_folded.view(weight.shape[0], ctx.groups, 1, ctx.head_dim)
        return d_rows, d_values, d_weight, None


class FoldableRowParallelLinear(RowParallelLinear):
    """Megatron-Core's row-parallel linear with a cheaper way for visual rows.

    Source: the identity in `fold`; arXiv 2502.01906 has each visual row attend to itself alone.
    """

    def __init__(self, input_size: int, output_size: int, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, **kwargs)
        # Once a product has added its gradient into the buffer by itself, DDP drops what autograd
        # brings, and the folded product's comes through autograd.
        self.gradient_accumulation_fusion = False

    def forward(
        self, input_: torch.Tensor, values: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Projects, with one reduction over the tensor parallel group.

        Args:
            input_: [rows, 1, heads / tp * head_dim]: all rows in the shards' order, or with
                `values` the text rows in the order of the whole pack.
            values: [V, 1, groups / tp * head_dim], values of the visual rows, in the order of
                the whole pack; None: `input_` holds every row.

        Returns:
            [rows (/ tp with sp), 1, hidden], with `values` `[V; T]` on every shard, and the bias.
        """
        if values is None:
            return super().forward(input_)
        assert self.bias is None, "the bias of a folded projection is not implemented"
        partial = _FoldedProjection.apply(
            input_.flatten(1), values.flatten(1), self.weight, self.config.kv_channels
        )[:, None]
        if not self.sequence_parallel:
            return reduce_from_tensor_model_parallel_region(partial, group=self.tp_group), None
        num_visual = values.shape[0]
        partial = interleave_shards(
            partial[:num_visual], partial[num_visual:], self.tp_group.size()
        )
        return reduce_scatter_to_sequence_parallel_region(partial, group=self.tp_group), None


class PostNorm:
    """Mixed into a linear: its output is normalised before the residual is added.

    Adds the parameter `post_norm.weight` (replicated).
    """

    def __init__(self, input_size: int, output_size: int, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, **kwargs)  # type: ignore[call-arg]
        self.post_norm = Norm(kwargs["config"], output_size, kwargs["config"].layernorm_epsilon)

    def forward(
        self, input_: torch.Tensor, values: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, None]:
        """Shapes are those of `FoldableRowParallelLinear`; the bias is added here."""
        output, bias = super().forward(input_, values)  # type: ignore[misc]
        if bias is not None:
            output = output + bias
        return self.post_norm(output), None


class RowParallelLinearWithPostNorm(PostNorm, FoldableRowParallelLinear):
    """A row-parallel linear whose output is normalised before the residual is added.

    Swapped in for `linear_proj` and `linear_fc2` by the layer spec, so that the transformer layer
    itself stays Megatron-Core's own.
    """
