"""The table of parameters: what each is called on both sides, its shape, shards, dtype and part.

One line (`Entry`) is one tensor of Megatron-Core, all layers of a stack together, made from one or
several tensors of Hugging Face. Converter, planner, initialiser and freezing read the same lines.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from dattn_mcore.types import Part

Shape = tuple[int, ...]
Start = Literal["normal", "residual", "fan_in", "uniform", "zeros", "norm", "constant", "row_norm"]

TOWER, PROJECTOR = "model.vision_tower.", "model.multi_modal_projector."  # Hugging Face names
# Where names of a part begin, on either side. What is none of these is the language model.
_PREFIXES: dict[str, Part] = {
    "vision.": "vision",
    TOWER: "vision",
    "projector.": "projector",
    PROJECTOR: "projector",
}


def part_of(name: str) -> Part:
    """The part of the model that a parameter belongs to, by its name on either side."""
    return next((part for prefix, part in _PREFIXES.items() if name.startswith(prefix)), "llm")


@dataclass(frozen=True)
class Mix:
    """How the Hugging Face tensors of an entry make one Megatron-Core tensor.

    Attributes:
        kind: `copy`: there is one, as it is. `stacked`: all rows of the first, then all rows of the
            second, and so on. `interleaved`: per group that group's rows of the first, then of the
            second, and so on. `padded`: rows of zeros are added to the only one.
        groups: of `interleaved`: attention heads or query groups.
        rows: of `padded`: rows in all.
    """

    kind: Literal["copy", "stacked", "interleaved", "padded"] = "copy"
    groups: int = 1
    rows: int = 0

    def shape(self, parts: Sequence[Shape]) -> Shape:
        """Shape of the Megatron-Core tensor, without an axis of layers."""
        rows = self.rows if self.kind == "padded" else sum(part[0] for part in parts)
        return (rows, *parts[0][1:])


COPY, STACKED = Mix(), Mix("stacked")


@dataclass(frozen=True)
class Entry:
    """One line of a table.

    Attributes:
        key: Megatron-Core key; None: the Hugging Face tensors are all zeros and exist there only.
        parts: Hugging Face names and shapes; `{layer}` in a name is the layer's number.
        mix: how the parts make the Megatron-Core tensor.
        layers: the Megatron-Core tensor stacks this many layers on a leading axis; None: no axis.
        numbers: which layers of the model these are; None: the first ones, as many as there are.
        tp_axis: axis (of one layer) that tensor parallel ranks share; None: each holds all of it.
        dtype: `model`: that of the model's weights; `float32` in every model.
        start: the initial value: `normal` with the part's standard deviation; `residual`, which
            is smaller, since it feeds the residual stream; `fan_in`; `uniform` within the square
            root of 1 / inputs; `zeros`; what a norm has; `constant`; or `row_norm`, the lengths of
            the rows of an adapted weight.
        constant: of that start.
    """

    key: str | None
    parts: dict[str, Shape] = field(default_factory=dict)
    mix: Mix = COPY
    layers: int | None = None
    numbers: tuple[int, ...] | None = None
    tp_axis: int | None = None
    dtype: Literal["model", "float32"] = "model"
    start: Start = "normal"
    constant: float = 0.0

    def number(self, layer: int) -> int:
        """Number in the model of a layer of the stack."""
        return layer if self.numbers is None else self.numbers[layer]

    def names(self, layer: int | None) -> list[str]:
        """Hugging Face names of one layer of the stack (None: of an entry without layers)."""
        number = None if layer is None else self.number(layer)
        return [name.replace("{layer}", str(number)) for name in self.parts]

    def steps(self) -> list[int | None]:
        """The layers to go through; `[None]` for an entry without layers."""
        return [None] if self.layers is None else list(range(self.layers))

    def all_numbers(self) -> list[int | None]:
        """Numbers in the model of the stack's layers; `[None]` for an entry without layers."""
        return [None if layer is None else self.number(layer) for layer in self.steps()]

    def layer_shape(self) -> Shape:
        """Shape of the Megatron-Core tensor, without the axis of layers."""
        return self.mix.shape(list(self.parts.values()))

    def mcore_shape(self) -> Shape:
        """Shape of the Megatron-Core tensor, the axis of layers included."""
        shape = self.layer_shape()
        return shape if self.layers is None else (self.layers, *shape)

    def shard_shape(self, tp_size: int) -> Shape:
        """Shape of one layer on one tensor parallel rank."""
        shape = list(self.layer_shape())
        if self.tp_axis is not None:
            shape[self.tp_axis] //= tp_size
        return tuple(shape)


def linear(
    key: str,
    name: str,
    shape: Shape,
    *,
    layers: int | None = None,
    tp_axis: int | None = None,
    dtype: Literal["model", "float32"] = "model",
    start: Start = "normal",
) -> list[Entry]:
    """Weight [out, in] and bias of a linear layer that is the same on both sides.

    Args:
        key: without `.weight`.
        name: of Hugging Face, likewise.
        shape: of the weight.
        layers: see `Entry`.
        tp_axis: 0: column parallel; 1: row parallel, whose bias each rank holds.
        dtype: see `Entry`.
        start: of the weight.
    """
    bias_axis = 0 if tp_axis == 0 else None
    return [
        Entry(
            f"{key}.weight",
            {f"{name}.weight": shape},
            layers=layers,
            tp_axis=tp_axis,
            dtype=dtype,
            start=start,
        ),
        Entry(
            f"{key}.bias",
            {f"{name}.bias": shape[:1]},
            layers=layers,
            tp_axis=bias_axis,
            dtype=dtype,
            start="zeros",
        ),
    ]


def norm(
    key: str, name: str, size: int, *, layers: int | None = None, bias: bool = False
) -> list[Entry]:
    """Weight (and bias) of a norm that is the same on both sides."""
    kinds = ("weight", "bias") if bias else ("weight",)
    return [
        Entry(f"{key}.{kind}", {f"{name}.{kind}": (size,)}, layers=layers, start="norm")
        for kind in kinds
    ]


def in_order_of_layers(table: Iterable[Entry]) -> list[tuple[Entry, int | None]]:
    """All entries, those of one layer next to each other, as Hugging Face shards are."""
    entries = list(table)
    single = [(entry, None) for entry in entries if entry.layers is None]
    stacked = [(entry, layer) for entry in entries for layer in entry.steps() if layer is not None]
    return [*single, *sorted(stacked, key=lambda step: step[1])]


def in_order_of_modules(
    table: Iterable[Entry], layers: Sequence[int] | None = None
) -> Iterator[tuple[Entry, int | None]]:
    """What Megatron-Core's modules hold, in their order: stacks of layers layer by layer.

    Args:
        table: in the order of the modules.
        layers: numbers in the model of the layers that are there; None: all of the stack.

    Yields:
        A line, and which of the layers that are there it is, from 0.
    """
    for is_single, group in itertools.groupby(table, key=lambda entry: entry.layers is None):
        entries = [entry for entry in group if entry.key is not None]
        if is_single:
            yield from ((entry, None) for entry in entries)
            continue
        most = max((entry.layers or 0 for entry in entries), default=0)
        for place, number in enumerate(range(most) if layers is None else layers):
            yield from (
                (entry, place)
                for entry in entries
                if entry.numbers is None or number in entry.numbers
            )
