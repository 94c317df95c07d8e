"""Low-rank adapters of tensor parallel linears: LoRA and DoRA.

A column-parallel linear holds A whole on every rank and its rank's rows of B; a row-parallel one
its rank's columns of A, and B whole. Between A and B stand `rank` numbers a row, which is what
ranks exchange: gathered (or copied) before a column-parallel B, summed behind a row-parallel A.
What every rank holds whole gets under sequence parallelism only its rows' share of the gradient,
and is marked so that Megatron-Core sums it.

Dropout of a column-parallel linear's inputs is the same on all ranks where the inputs are, and
otherwise each rank draws its own, from Megatron-Core's tracker; context parallel ranks, which have
other rows, always do. The folded projection draws once
for a visual row's value, not for each query head that repeats it: there is one product for all
heads of a group.

Linears that can have an adapter are in `adaptable`.

Source: LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353, section 4.3 (lengths of rows are constants
in backward). Both are computed as `peft` does, but for dropout with DoRA, which touches the
adapter's inputs alone here.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn

from dattn_mcore.architectures.adapters import AdaptedLinear, Adapters
from dattn_mcore.architectures.parameters import Mix
from dattn_mcore.layers.layout import interleave_shards
from dattn_mcore.layers.linear import fold
from dattn_mcore.parallel import platform


def part_of_rows(mix: Mix, sizes: list[int], tp_rank: int, tp_size: int) -> torch.Tensor:
    """Which Hugging Face linear each output of a fused column-parallel linear belongs to.

    Args:
        mix: how the linear's rows are mixed.
        sizes: outputs of each Hugging Face linear.
        tp_rank: whose shard it is.
        tp_size: of so many.

    Returns:
        int64 [outputs / tp_size].
    """
    if mix.kind == "interleaved":
        pattern = [n // mix.groups for n in sizes]
        whole = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(pattern))
        return whole.repeat(mix.groups).chunk(tp_size)[tp_rank]
    # Each rank has its share of the first, then its share of the second.
    shares = torch.tensor([n // tp_size for n in sizes])
    return torch.repeat_interleave(torch.arange(len(sizes)), shares)


class Adapter(nn.Module):
    """Adapters of one linear; `a` [parts * rank, in], `b` [outputs, rank], `magnitude` [outputs].

    Outputs are those of the adapted Hugging Face linears, in the linear's own order.

    Args:
        config: of the linear.
        adapters: rank, scale, dropout, and whether there is a magnitude.
        linear: what is adapted.
        layer: number of the layer in the model, from 0.
        tp_group: tensor parallel group.
    """

    def __init__(
        self,
        config: TransformerConfig,
        adapters: Adapters,
        linear: AdaptedLinear,
        layer: int,
        tp_group: dist.ProcessGroup,
    ) -> None:
        super().__init__()
        self.config, self.linear, self.tp_group = config, linear, tp_group
        self.scale, self.dropout = adapters.scale, adapters.dropout
        self.stack = (linear.layers.index(layer), len(linear.layers))
        tp_size, rank, dtype = tp_group.size(), adapters.rank, config.params_dtype
        self.row_parallel = linear.is_row_parallel
        self.shards = tp_size if config.sequence_parallel else 1
        columns = linear.shapes()[0][1] // (tp_size if self.row_parallel else 1)
        self._place_outputs(tp_size)
        self.a = nn.Parameter(torch.empty(len(linear.parts) * rank, columns, dtype=dtype))
        self.b = nn.Parameter(torch.empty(self.num_outputs, rank, dtype=dtype))
        self.magnitude = None
        if adapters.dora:
            self.magnitude = nn.Parameter(torch.empty(self.num_outputs, dtype=dtype))
        for name, parameter in self.named_parameters():
            axis = self._tp_axes().get(name)
            if axis is None:
                parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
            else:
                set_tensor_model_parallel_attributes(parameter, True, axis, 1)

    def _place_outputs(self, tp_size: int) -> None:
        """Which of the linear's outputs are adapted, and by which of the parts."""
        linear = self.linear
        self.rows: torch.Tensor | None
        self.of_part: torch.Tensor | None
        sizes = [shape[0] for shape in linear.entry.parts.values()]
        if self.row_parallel:
            kinds = torch.zeros(sizes[0], dtype=torch.int64)
        else:
            rank = dist.get_rank(self.tp_group)
            kinds = part_of_rows(linear.entry.mix, sizes, rank, tp_size)
        rows = torch.isin(kinds, torch.tensor(linear.parts)).nonzero()[:, 0]
        self.num_outputs = len(rows)
        several = len(linear.parts) > 1
        one_hot = F.one_hot(kinds, len(sizes)) if several else None
        self.register_buffer("rows", rows if len(rows) < len(kinds) else None, persistent=False)
        self.register_buffer("of_part", one_hot, persistent=False)

    def _tp_axes(self) -> dict[str, int]:
        return {"a": 1} if self.row_parallel else {"b": 0, "magnitude": 0}

    def forward(
        self,
        input_: torch.Tensor,
        output: torch.Tensor,
        *,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        values: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Adds the adapters' part to a linear's output.

        Args:
            input_: of the linear.
            output: of the linear, of this rank; with its bias, if that is given.
            weight: of the linear, of this rank.
            bias: that is in the output.
            values: of the folded projection, see `layers.linear`.

        Returns:
            What the adapted linear gives, shaped as `output`.
        """
        scaled = self.scale * self._product(input_, values)
        if self.rows is not None:
            nothing = torch.zeros_like(output)
            scaled = nothing.index_copy(-1, self.rows, scaled.to(output.dtype))
        if self.magnitude is None:
            return output + scaled
        plain = output if bias is None else output - bias
        adapted = (plain + scaled) * self._gain(weight).to(output.dtype)
        return adapted if bias is None else adapted + bias

    def start_magnitude(self, weight: torch.Tensor) -> None:
        """Gives each row the length that it has, so that the model stays what it is."""
        if self.magnitude is not None:
            self.magnitude.data.copy_(self._lengths(weight))

    def _product(self, input_: torch.Tensor, values: torch.Tensor | None) -> torch.Tensor:
        group = self.tp_group
        inside = F.linear(self._dropped(input_), self.a)
        if not self.row_parallel:
            if self.shards > 1:
                inside = gather_from_sequence_parallel_region(inside, group=group)
            else:
                inside = copy_to_tensor_model_parallel_region(inside, group=group)
            return F.linear(inside, self._wide_b())
        if values is not None:
            head_dim = self.config.kv_channels
            folded = fold(self.a, values.shape[-1] // head_dim, head_dim)
            visual = F.linear(self._dropped(values), folded)
            inside = interleave_shards(visual, inside, self.shards)
        if self.shards > 1:
            inside = reduce_scatter_to_sequence_parallel_region(inside, group=group)
        else:
            inside = reduce_from_tensor_model_parallel_region(inside, group=group)
        return F.linear(inside, self.b)

    def _dropped(self, rows: torch.Tensor) -> torch.Tensor:
        if not self.training or self.dropout == 0:
            return rows
        own = self.tp_group.size() > 1 if self.row_parallel else self.shards > 1
        with platform.rng_of_rows(own=own):
            return F.dropout(rows, self.dropout)

    def _wide_b(self) -> torch.Tensor:
        """[outputs, parts * rank]: each output takes what A of its own part gives."""
        if self.of_part is None:
            return self.b
        mask = self.of_part.to(self.b.dtype)
        return (mask[:, :, None] * self.b[:, None, :]).flatten(1)

    def _gain(self, weight: torch.Tensor) -> torch.Tensor:
        """What each of the linear's outputs is multiplied by, [outputs] in float32."""
        assert self.magnitude is not None
        gain = self.magnitude.float() / self._lengths(weight)
        if self.rows is None:
            return gain
        return torch.ones(weight.shape[0], device=gain.device).index_copy(0, self.rows, gain)

    @torch.no_grad()
    def _lengths(self, weight: torch.Tensor) -> torch.Tensor:
        """Lengths of the rows of W + scale B A, [outputs] in float32, the same on ranks that share.

        Constants in backward: DoRA, section 4.3.
        """
        weight = weight if self.rows is None else weight[self.rows]
        adapted = weight + self.scale * (self._wide_b() @ self.a)
        squares = adapted.float().square().sum(1)
        if self.row_parallel and self.tp_group.size() > 1:
            dist.all_reduce(squares, group=self.tp_group)
        return squares.sqrt()

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Stacked over the layers that have this adapter, not over all."""
        assert metadata is not None
        offsets = ((0, *self.stack),) if sharded_offsets else ()
        entries = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            self._tp_axes(),
            offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        if self.linear.mix.kind == "stacked":
            for name in ("b", "magnitude"):
                key = f"{prefix}{name}"
                if key in entries:
                    entries[key] = apply_swiglu_sharded_factory(entries[key], offsets)
        return cast(dict[str, Any], entries)
