"""Initial weights that are the same in every layout.

A parameter's initial value is a pure function of the seed, its name in the checkpoint and its
layer. Each rank draws the whole tensor on the CPU and keeps its shard, so a run started at tp 2 x
pp 2 has the weights that it would have had in one process.
"""

from __future__ import annotations

import hashlib

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from dattn_mcore.architectures.parameters import Entry, part_of
from dattn_mcore.architectures.sizes import ModelConfig
from dattn_mcore.architectures.tables import model_table
from dattn_mcore.models.dattn import DattnModel


def initialize_weights(chunks: list[DattnModel], model: ModelConfig, seed: int) -> None:
    """Fills all parameters of this rank's model chunks in place."""
    table = {entry.key: entry for entry in model_table(model)}
    with torch.no_grad():
        for chunk in chunks:
            for item in chunk.sharded_state_dict().values():
                shards = item.build() if isinstance(item, ShardedTensorFactory) else [item]
                for shard in shards:
                    if isinstance(shard, ShardedTensor):
                        _fill(shard, table[shard.key], model, seed)


def _fill(shard: ShardedTensor, entry: Entry, model: ModelConfig, seed: int) -> None:
    leading = shard.prepend_axis_num
    layer = shard.global_offset[0] if leading else 0
    value = initial_value(entry, layer=layer, model=model, seed=seed)
    if value is None:
        return
    offset = shard.global_offset[leading:]
    for axis, (start, length) in enumerate(zip(offset, shard.data.shape, strict=True)):
        value = value.narrow(axis, start, length)
    shard.data.copy_(value)


def initial_value(
    entry: Entry, *, layer: int, model: ModelConfig, seed: int
) -> torch.Tensor | None:
    """The whole initial tensor of one layer; None if it keeps its constructed value (norms)."""
    shape = entry.layer_shape()
    if entry.start == "norm":
        return None
    if entry.start == "constant":
        return torch.full(shape, entry.constant)
    if entry.start == "zeros":
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}/{entry.key}/{layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randn(shape, generator=generator) * _std(entry, model)


def _std(entry: Entry, model: ModelConfig) -> float:
    if entry.start == "fan_in":  # activations keep their scale
        return float(torch.Size(entry.layer_shape()[1:]).numel()) ** -0.5
    assert entry.key is not None
    part = model.vision if part_of(entry.key) == "vision" else model.llm
    return (
        part.init_std / (2 * part.num_layers) ** 0.5 if entry.start == "residual" else part.init_std
    )
