"""What a line of a mapping table is, and how it joins and splits tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Mix:
    """How the Hugging Face tensors of an entry make one Megatron-Core tensor, and back.

    Attributes:
        join: Hugging Face tensors to one Megatron-Core tensor.
        split: the inverse, bit for bit.
    """

    join: Callable[[Sequence[Tensor]], Tensor]
    split: Callable[[Tensor], list[Tensor]]


COPY = Mix(join=lambda parts: parts[0], split=lambda tensor: [tensor])


def stacked_rows(*sizes: int) -> Mix:
    """All rows of the first tensor, then all rows of the second, and so on."""
    return Mix(
        join=lambda parts: torch.cat(list(parts)), split=lambda tensor: list(tensor.split(sizes))
    )


def interleaved(groups: int, parts: int) -> Mix:
    """Per group: that group's rows of the first tensor, then of the second, and so on.

    Args:
        groups: attention heads or query groups.
        parts: tensors, all with the same number of rows.
    """

    def join(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([t.unflatten(0, (groups, -1)) for t in tensors], dim=1).flatten(0, 1)

    def split(tensor: Tensor) -> list[Tensor]:
        return [t.flatten(0, 1) for t in tensor.unflatten(0, (groups, parts, -1)).unbind(dim=1)]

    return Mix(join, split)


def padded_rows(rows: int, multiple: int) -> Mix:
    """The vocabulary: zero rows are added up to a multiple, and never leave."""
    padded = -(-rows // multiple) * multiple

    def join(parts: Sequence[Tensor]) -> Tensor:
        if padded == rows:
            return parts[0]
        pad = parts[0].new_zeros(padded - rows, *parts[0].shape[1:])
        return torch.cat([parts[0], pad])

    return Mix(join, split=lambda tensor: [tensor[:rows]])


@dataclass(frozen=True)
class Entry:
    """One line of a table.

    Attributes:
        key: Megatron-Core key; None: the Hugging Face tensors are all zeros and exist there only.
        parts: Hugging Face names and shapes; `{layer}` in a name is the layer's number.
        mix: how the parts make the Megatron-Core tensor.
        layers: the Megatron-Core tensor stacks this many layers on a leading axis; None: no axis.
    """

    key: str | None
    parts: dict[str, Shape] = field(default_factory=dict)
    mix: Mix = COPY
    layers: int | None = None

    def names(self, layer: int | None) -> list[str]:
        """Hugging Face names of one layer (None: of an entry without layers)."""
        return [name.replace("{layer}", str(layer)) for name in self.parts]

    def steps(self) -> list[int | None]:
        """The layers to go through; `[None]` for an entry without layers."""
        return [None] if self.layers is None else list(range(self.layers))

    def mcore_shape(self) -> Shape:
        """Shape of the Megatron-Core tensor, the layer axis included."""
        parts = [torch.empty(shape, device="meta") for shape in self.parts.values()]
        shape = tuple(self.mix.join(parts).shape)
        return shape if self.layers is None else (self.layers, *shape)


def linear(key: str, name: str, rows: int, columns: int, layers: int | None = None) -> list[Entry]:
    """Weight and bias of a linear layer that is the same on both sides."""
    return [
        Entry(f"{key}.weight", {f"{name}.weight": (rows, columns)}, layers=layers),
        Entry(f"{key}.bias", {f"{name}.bias": (rows,)}, layers=layers),
    ]


def norm(key: str, name: str, size: int, layers: int | None = None, bias: bool = False):
    """Weight (and bias) of a norm that is the same on both sides."""
    entries = [Entry(f"{key}.weight", {f"{name}.weight": (size,)}, layers=layers)]
    if bias:
        entries.append(Entry(f"{key}.bias", {f"{name}.bias": (size,)}, layers=layers))
    return entries


def in_order_of_layers(table: list[Entry]) -> list[tuple[Entry, int | None]]:
    """All entries, those of one layer next to each other, as Hugging Face shards are."""
    single = [(entry, None) for entry in table if entry.layers is None]
    stacked = [(entry, layer) for entry in table for layer in entry.steps() if layer is not None]
    return [*single, *sorted(stacked, key=lambda step: step[1])]
