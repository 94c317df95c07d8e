"""Linears of the layer spec that can be given an adapter, and what gives them one.

Transformer Engine's are in `spec_te`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import nn

from dattn_mcore.architectures.adapters import AdaptedLinear, Adapters
from dattn_mcore.layers.linear import FoldableRowParallelLinear, PostNorm
from dattn_mcore.layers.lora import Adapter


class Adaptable:
    """Mixed into a tensor parallel linear: it can be given an adapter after it is built."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.adapter_name: str | None = None

    def add_adapter(self, name: str, adapter: Adapter) -> None:
        """Adds the one adapter of this linear as a module under a name."""
        assert self.adapter_name is None
        self.adapter_name = name
        setattr(self, name, adapter)

    @property
    def adapter(self) -> Adapter | None:
        """The adapter, if there is one."""
        return None if self.adapter_name is None else getattr(self, self.adapter_name)

    def forward(
        self, input_: torch.Tensor, values: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Takes and returns what the linear does."""
        arguments = (input_,) if values is None else (input_, values)
        output, bias = super().forward(*arguments)  # type: ignore[misc]
        adapter = self.adapter
        if adapter is None:
            return output, bias
        linear: Any = self
        added = bias is None and linear.bias is not None and linear.bias.numel() > 0
        inside = linear.bias if added else None
        return adapter(input_, output, weight=linear.weight, bias=inside, values=values), bias

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The linear's, and the adapter's own."""
        linear: Any = super()
        entries: dict[str, Any] = linear.sharded_state_dict(prefix, sharded_offsets, metadata)
        if self.adapter is not None:
            name = f"{prefix}{self.adapter_name}."
            entries.update(self.adapter.sharded_state_dict(name, sharded_offsets, metadata))
        return entries


class AdaptableColumn(Adaptable, ColumnParallelLinear):
    """Column-parallel linear."""


class AdaptableRow(Adaptable, RowParallelLinear):
    """Row-parallel linear."""


class AdaptableFoldableRow(Adaptable, FoldableRowParallelLinear):
    """Row-parallel projection with the cheaper way for visual rows."""


class AdaptableRowWithPostNorm(PostNorm, Adaptable, FoldableRowParallelLinear):
    """The same, its output normalised; the adapter comes before the norm."""


def add_adapters(
    layers: Iterable[nn.Module],
    adapters: Adapters,
    linears: list[AdaptedLinear],
    tp_group: dist.ProcessGroup,
) -> None:
    """Gives the layers of a stage their adapters, whose values are garbage yet.

    Args:
        layers: Megatron-Core's, of a spec whose linears can have adapters.
        adapters: rank and the like.
        linears: of the whole model.
        tp_group: tensor parallel group.
    """
    for layer in layers:
        number: int = layer.layer_number - 1  # type: ignore[operator,assignment]
        for linear in linears:
            if number in linear.layers:
                module: Any = layer.get_submodule(linear.place)
                adapter = Adapter(module.config, adapters, linear, number, tp_group)
                module.add_adapter(linear.name, adapter)


def adapter_names(model: nn.Module) -> set[str]:
    """Names of all parameters of adapters."""
    return {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, Adapter)
        for name, _ in module.named_parameters()
    }


def start_magnitudes(model: nn.Module) -> None:
    """Gives the magnitudes of DoRA the lengths of the rows that the model now has."""
    for module in model.modules():
        if isinstance(module, Adaptable) and module.adapter is not None:
            module.adapter.start_magnitude(module.weight)  # type: ignore[arg-type]
