"""Low-rank adapters (LoRA, DoRA) beside a language model's linears: which, and their tensors.

An adapted linear computes `W x + alpha / rank * B A x`; with DoRA each row of that sum of weights
is brought to a learnt length. Each Hugging Face linear has an adapter of its own. Where the trainer
has one linear for two of them (keys and values, gate and up), their adapters lie in the same
tensors, mixed as the weights are.

Source: LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353; names and shapes are those of `peft`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from dattn_mcore.architectures.decoder import LAYER
from dattn_mcore.architectures.parameters import COPY, STACKED, Entry, Mix, Start
from dattn_mcore.architectures.sizes import ModelConfig
from dattn_mcore.architectures.tables import language_table, model_table

PEFT_PREFIX = "base_model.model."  # of names in a folder of `peft`
A, B, MAGNITUDE = "a", "b", "magnitude"
_PEFT_NAMES = {A: "lora_A.weight", B: "lora_B.weight", MAGNITUDE: "lora_magnitude_vector"}


@dataclass(frozen=True)
class Adapters:
    """The adapters of a model.

    Attributes:
        rank: rows of A, columns of B.
        alpha: their product counts alpha / rank.
        targets: exported names of the weights that have one, such as
            `model.language_model.layers.3.self_attn.q_proj.weight`.
        dropout: share of the adapter's inputs that are 0 in training.
        dora: with a learnt length of each row (DoRA).
    """

    rank: int
    alpha: float
    targets: frozenset[str]
    dropout: float = 0.0
    dora: bool = False

    @property
    def scale(self) -> float:
        """What the product of B and A is multiplied by."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class AdaptedLinear:
    """The adapter of one of the trainer's linears, in the layers where it has the same parts.

    Attributes:
        entry: the line of the linear's weight.
        parts: which of its Hugging Face linears are adapted, in order.
        layers: numbers of these layers, from 0.
    """

    entry: Entry
    parts: tuple[int, ...]
    layers: tuple[int, ...]

    @property
    def place(self) -> str:
        """The linear's name in a layer, such as `self_attention.linear_q`."""
        assert self.entry.key is not None
        return self.entry.key.removeprefix(LAYER).removesuffix(".weight")

    @property
    def name(self) -> str:
        """Of the adapter's module in the linear: `lora`, or `lora_k_proj` of one of two parts."""
        if len(self.parts) == len(self.entry.parts):
            return "lora"
        names = [name.split(".")[-2] for name in self.entry.parts]
        return "_".join(["lora", *(names[part] for part in self.parts)])

    @property
    def prefix(self) -> str:
        """Of the keys of its tensors."""
        return f"{LAYER}{self.place}.{self.name}."

    @property
    def is_row_parallel(self) -> bool:
        """Tensor parallel ranks share the linear's input, not its output."""
        return self.entry.tp_axis == 1

    @property
    def mix(self) -> Mix:
        """How B (and the magnitude) of its parts make one tensor."""
        return self.entry.mix if len(self.parts) > 1 else COPY

    def shapes(self) -> list[tuple[int, int]]:
        """(outputs, inputs) of each of its parts."""
        shapes = [(shape[0], shape[1]) for shape in self.entry.parts.values()]
        return [shapes[part] for part in self.parts]


def linears(model: ModelConfig) -> list[Entry]:
    """The lines of all linears that can have adapters: those of the language model's layers."""
    return [
        entry
        for entry in language_table(model)
        if entry.key is not None and entry.key.startswith(LAYER) and len(entry.layer_shape()) == 2
    ]


def summed_weight(model: ModelConfig) -> Entry:
    """The line of the weight that tells base models apart: the attention's projection."""
    return next(entry for entry in linears(model) if entry.tp_axis == 1)


def adapted_linears(model: ModelConfig, adapters: Adapters) -> list[AdaptedLinear]:
    """The adapters of a model, in the order of Megatron-Core's modules."""
    found = []
    for entry in linears(model):
        layers_of: dict[tuple[int, ...], list[int]] = {}
        for layer in range(entry.layers or 0):
            names = entry.names(layer)
            parts = tuple(i for i, name in enumerate(names) if name in adapters.targets)
            if parts:
                layers_of.setdefault(parts, []).append(layer)
        found += [AdaptedLinear(entry, parts, tuple(n)) for parts, n in sorted(layers_of.items())]
    return found


def adapter_entries(linear: AdaptedLinear, adapters: Adapters) -> list[Entry]:
    """The lines of one linear's adapter: A and B, with DoRA the magnitude too."""
    names = [list(linear.entry.parts)[part] for part in linear.parts]
    rows, rank = linear.is_row_parallel, adapters.rank

    def entry(
        tensor: str, sizes: list[tuple[int, ...]], mix: Mix, tp_axis: int | None, start: Start
    ) -> Entry:
        peft = [
            f"{PEFT_PREFIX}{name.removesuffix('weight')}{_PEFT_NAMES[tensor]}" for name in names
        ]
        return Entry(
            f"{linear.prefix}{tensor}",
            dict(zip(peft, sizes, strict=True)),
            mix,
            layers=len(linear.layers),
            numbers=linear.layers,
            tp_axis=tp_axis,
            start=start,
        )

    shapes = linear.shapes()
    stacked = STACKED if len(shapes) > 1 else COPY
    entries = [
        entry(A, [(rank, n) for _, n in shapes], stacked, 1 if rows else None, "uniform"),
        entry(B, [(n, rank) for n, _ in shapes], linear.mix, None if rows else 0, "zeros"),
    ]
    if adapters.dora:
        axis = None if rows else 0
        lengths: list[tuple[int, ...]] = [(n,) for n, _ in shapes]
        entries.append(entry(MAGNITUDE, lengths, linear.mix, axis, "row_norm"))
    return entries


def adapter_table(model: ModelConfig, adapters: Adapters) -> list[Entry]:
    """The lines of all adapters of a model."""
    found = adapted_linears(model, adapters)
    return [entry for linear in found for entry in adapter_entries(linear, adapters)]


def by_number(table: Iterable[Entry]) -> list[tuple[Entry, str, int]]:
    """Lines of adapters layer by layer: a line that names layers by their numbers, key, number."""
    return [
        (dataclasses.replace(entry, numbers=None), entry.key, entry.number(place))
        for entry in table
        if entry.key is not None
        for place in range(entry.layers or 0)
    ]


def with_adapters(table: Iterable[Entry], model: ModelConfig, adapters: Adapters) -> list[Entry]:
    """A table with the lines of adapters in it: behind all others of their linears."""
    lines = list(table)
    for linear in adapted_linears(model, adapters):
        own = f"{LAYER}{linear.place}."
        last = max(i for i, entry in enumerate(lines) if (entry.key or "").startswith(own))
        lines[last + 1 : last + 1] = adapter_entries(linear, adapters)
    return lines


def adapted_table(model: ModelConfig, adapters: Adapters | None) -> list[Entry]:
    """Every tensor of a model, those of its adapters included."""
    table = model_table(model)
    return table if adapters is None else with_adapters(table, model, adapters)
