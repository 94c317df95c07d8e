"""Initial weights that are the same in every layout.

A parameter's initial value is a pure function of the seed, its name in the checkpoint and its
layer. Each rank draws the whole tensor on the CPU and keeps its shard, so a run started at tp 2 x
pp 2 has the weights that it would have had in one process.
"""

from __future__ import annotations

import hashlib

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from dattn_mcore.config.schema import Config
from dattn_mcore.models.dattn import DattnModel


def initialize_weights(chunks: list[DattnModel], config: Config, seed: int) -> None:
    """Fills all parameters of this rank's model chunks in place."""
    with torch.no_grad():
        for chunk in chunks:
            for entry in chunk.sharded_state_dict().values():
                shards = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
                for shard in shards:
                    if isinstance(shard, ShardedTensor):
                        _fill(shard, config, seed)


def _fill(shard: ShardedTensor, config: Config, seed: int) -> None:
    leading = shard.prepend_axis_num
    layer = shard.global_offset[0] if leading else 0
    shape, offset = shard.global_shape[leading:], shard.global_offset[leading:]
    value = initial_value(shard.key, layer, tuple(shape), config, seed)
    if value is None:
        return
    for axis, (start, length) in enumerate(zip(offset, shard.data.shape, strict=True)):
        value = value.narrow(axis, start, length)
    shard.data.copy_(value)


def initial_value(
    key: str, layer: int, shape: tuple[int, ...], config: Config, seed: int
) -> torch.Tensor | None:
    """The whole initial tensor of a parameter; None if it keeps its constructed value (norms)."""
    if key == "projector.output_norm.weight":
        return torch.full(shape, config.model.projector.output_norm_init)
    if "norm." in key:
        return None
    if key.endswith(".bias"):
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}/{key}/{layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randn(shape, generator=generator) * _std(key, shape, config)


def _std(key: str, shape: tuple[int, ...], config: Config) -> float:
    if key.startswith(("projector.", "vision.patch_embedding")):
        return float(torch.Size(shape[1:]).numel()) ** -0.5  # fan-in: activations keep their scale
    vision = key.startswith("vision.")
    part = config.model.vision if vision else config.model.llm
    into_residual = ".linear_proj." in key or ".linear_fc2." in key
    return part.init_std / (2 * part.num_layers) ** 0.5 if into_residual else part.init_std
