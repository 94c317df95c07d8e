"""Initial weights that are the same in every layout.

A parameter's initial value is a pure function of the seed, its name in the checkpoint and its
layer. Each rank draws the whole tensor on the CPU and keeps its shard, so a run started at tp 2 x
pp 2 has the weights that it would have had in one process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from dattn_mcore.architectures.adapters import Adapters, adapted_table, adapter_table
from dattn_mcore.architectures.parameters import Entry, part_of
from dattn_mcore.architectures.sizes import ModelConfig
from dattn_mcore.layers.adaptable import start_magnitudes
from dattn_mcore.models.dattn import DattnModel

Values = Callable[[Entry, int], torch.Tensor | None]


def initialize_weights(
    chunks: list[DattnModel], model: ModelConfig, seed: int, adapters: Adapters | None = None
) -> None:
    """Fills all parameters of this rank's model chunks in place."""
    fill(chunks, adapted_table(model, adapters), _drawn(model, seed))
    for chunk in chunks:
        start_magnitudes(chunk)


def initialize_adapters(
    chunks: list[DattnModel], model: ModelConfig, seed: int, adapters: Adapters
) -> None:
    """Fills the adapters of this rank's model chunks, whose other weights are there already."""
    fill(chunks, adapter_table(model, adapters), _drawn(model, seed), others=True)
    for chunk in chunks:
        start_magnitudes(chunk)


def initialize_entries(
    chunks: list[DattnModel], model: ModelConfig, seed: int, *, prefix: str
) -> None:
    """Fills the parameters whose names begin with `prefix`; all others stay what they are."""
    table = [entry for entry in adapted_table(model, None) if (entry.key or "").startswith(prefix)]
    fill(chunks, table, _drawn(model, seed), others=True)


def _drawn(model: ModelConfig, seed: int) -> Values:
    return lambda entry, layer: initial_value(entry, layer=layer, model=model, seed=seed)


def fill(
    chunks: list[DattnModel], table: Iterable[Entry], values: Values, others: bool = False
) -> None:
    """Puts values into the parameters of this rank's model chunks.

    Args:
        chunks: of this rank.
        table: lines of what is filled.
        values: gives the whole tensor of one layer of a line's stack (0 of an entry without
            layers), or None: the parameter stays what it is.
        others: parameters that are in no line stay what they are; otherwise there are none.
    """
    lines = {entry.key: entry for entry in table}
    with torch.no_grad():
        for chunk in chunks:
            for item in chunk.sharded_state_dict().values():
                shards = item.build() if isinstance(item, ShardedTensorFactory) else [item]
                for shard in shards:
                    if isinstance(shard, ShardedTensor) and not (others and shard.key not in lines):
                        _fill(shard, lines[shard.key], values)


def _fill(shard: ShardedTensor, entry: Entry, values: Values) -> None:
    leading = shard.prepend_axis_num
    value = values(entry, shard.global_offset[0] if leading else 0)
    if value is None:
        return
    offset = shard.global_offset[leading:]
    for axis, (start, length) in enumerate(zip(offset, shard.data.shape, strict=True)):
        value = value.narrow(axis, start, length)
    shard.data.copy_(value)


def initial_value(
    entry: Entry, *, layer: int, model: ModelConfig, seed: int
) -> torch.Tensor | None:
    """The whole initial tensor of one layer of the stack.

    None if it keeps its constructed value (norms), or is found from others (`row_norm`).
    """
    shape = entry.layer_shape()
    if entry.start in ("norm", "row_norm"):
        return None
    if entry.start == "constant":
        return torch.full(shape, entry.constant)
    if entry.start == "zeros":
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}/{entry.key}/{entry.number(layer)}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    if entry.start == "uniform":
        return (2 * torch.rand(shape, generator=generator) - 1) * shape[-1] ** -0.5
    return torch.randn(shape, generator=generator) * _std(entry, model)


def _std(entry: Entry, model: ModelConfig) -> float:
    if entry.start == "fan_in":  # activations keep their scale
        return float(torch.Size(entry.layer_shape()[1:]).numel()) ** -0.5
    assert entry.key is not None
    part = model.vision if part_of(entry.key) == "vision" else model.llm
    return (
        part.init_std / (2 * part.num_layers) ** 0.5 if entry.start == "residual" else part.init_std
    )
