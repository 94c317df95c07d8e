"""What a checkpoint holds: model, optimizer and RNG as Megatron-Core's sharded state."""

from __future__ import annotations

from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_pg_rank, get_pg_size

from dattn_mcore.models.dattn import DattnModel
from dattn_mcore.parallel import platform

# Optimizer state per parameter in its full shape: loads into any tp, pp and dp.
METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def metadata(pg_collection: ProcessGroupCollection) -> dict[str, Any]:
    """Options for Megatron-Core's `sharded_state_dict` calls."""
    return {**METADATA, "dp_cp_group": pg_collection.dp_cp}


def model_state(
    chunks: list[DattnModel], pg_collection: ProcessGroupCollection
) -> dict[str, dict[str, Any]]:
    """Sharded weights of this rank's chunks, under the names `model0`, `model1`, ..."""
    state = {}
    for index, chunk in enumerate(chunks):
        entries = chunk.sharded_state_dict(metadata=metadata(pg_collection))
        # FP8 scales of Transformer Engine aside, `_extra_state` is empty; without it a checkpoint
        # is the same for every layer spec.
        state[f"model{index}"] = {
            name: entry for name, entry in entries.items() if not name.endswith("_extra_state")
        }
    return state


def optimizer_state(
    optimizer: MegatronOptimizer,
    model: dict[str, dict[str, Any]],
    pg_collection: ProcessGroupCollection,
    is_loading: bool,
) -> dict[str, Any]:
    """Sharded optimizer state that matches a `model_state`."""
    return optimizer.sharded_state_dict(
        model, is_loading=is_loading, metadata=metadata(pg_collection)
    )


def rng_state(pg_collection: ProcessGroupCollection, layout: tuple[int, int]) -> ShardedObject:
    """RNG of this tensor and pipeline rank; meaningful in the same (pp, tp) layout only."""
    rank = (get_pg_rank(pg_collection.pp), get_pg_rank(pg_collection.tp))
    return ShardedObject(
        f"rng_pp{layout[0]}_tp{layout[1]}",
        platform.rng_state(),
        layout,
        rank,
        replica_id=get_pg_rank(pg_collection.dp_cp),
    )


def layout_of(pg_collection: ProcessGroupCollection) -> tuple[int, int]:
    """(pp, tp) sizes."""
    return get_pg_size(pg_collection.pp), get_pg_size(pg_collection.tp)
