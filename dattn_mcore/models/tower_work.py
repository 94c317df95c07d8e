"""How ranks of a tensor parallel group divide the vision tower and the projector.

`tensor`: each has a part of their linears and computes it for every tile. `tiles`: each has all of
their weights and computes some tiles, as a data parallel replica would. Then
- their gradients on these ranks are of different tiles, and are summed;
- the weights are the same on these ranks, and count once in a norm and in a checkpoint.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_pg_rank
from torch import nn

from dattn_mcore.architectures.parameters import part_of
from dattn_mcore.types import TowerWork


def groups_of_tower(pg_collection: ProcessGroupCollection, work: TowerWork) -> Any:
    """Process groups that the vision tower and the projector are built with.

    Args:
        pg_collection: of the model. Its `ep` must be this rank alone, as it is without experts.
        work: how tensor parallel ranks divide them.

    Returns:
        With `tiles` the same groups, but a tensor parallel group of this rank alone.
    """
    if work == "tensor" or pg_collection.tp.size() == 1:
        return pg_collection
    assert pg_collection.ep.size() == 1
    own = copy.copy(pg_collection)
    own.tp = pg_collection.ep
    return own


def group_of_tiles(pg_collection: ProcessGroupCollection, work: TowerWork) -> dist.ProcessGroup:
    """Ranks that share the tiles of a pack; see `place_in_group`."""
    return pg_collection.cp if work == "tensor" else pg_collection.tp_cp


def place_in_group(pg_collection: ProcessGroupCollection, work: TowerWork) -> tuple[int, int]:
    """This rank's number in `group_of_tiles`, and how many ranks that has.

    With `tiles` the tensor parallel ranks of a context parallel rank follow each other, as the
    shards of its rows do in the pack.
    """
    group = group_of_tiles(pg_collection, work)
    rank, tp = get_pg_rank(group), pg_collection.tp
    assert work == "tensor" or rank == get_pg_rank(pg_collection.cp) * tp.size() + get_pg_rank(tp)
    return rank, group.size()


def mark_replicated(modules: Iterable[nn.Module]) -> None:
    """Lets Megatron-Core count parameters on the first tensor parallel rank only.

    It marks the weights of its linears as divided, whatever the size of their group.
    """
    for parameter in itertools.chain.from_iterable(module.parameters() for module in modules):
        parameter.tensor_model_parallel = False  # type: ignore[attr-defined]


def number_replicas(entries: dict[str, Any], tp_group: dist.ProcessGroup) -> None:
    """Lets one rank of a tensor parallel group write the tower's and the projector's weights.

    Megatron-Core numbers the replicas of an entry by pipeline, tensor parallel and data parallel
    rank, and takes the tensor parallel one from the group of the module: here of one rank.

    Args:
        entries: sharded state dict of a model; changed in place.
        tp_group: of the model.
    """
    for name, entry in entries.items():
        if part_of(name) != "llm" and hasattr(entry, "replica_id"):
            pipeline, _, data = entry.replica_id
            entry.replica_id = (pipeline, get_pg_rank(tp_group), data)
