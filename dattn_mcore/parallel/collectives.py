"""Records what a rank exchanges with others: every collective, and every send and receive.

The calls are seen where PyTorch hands them to a backend, so that it does not matter which library
made them, and by which function: a real run on a CPU, and a rehearsal (`parallel.rehearsal`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.utils._python_dispatch import TorchDispatchMode

NAMESPACE = "c10d"  # of PyTorch's operators that exchange
# Operators by what they do; those that are absent keep their own name.
_NAMES = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "all_gather_single_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "alltoall_base_": "all_to_all",
    "broadcast_": "broadcast",
    "recv_": "receive",
    "recv_any_source_": "receive",
}
# Groups of Megatron-Core's by their fields there; others are named by what they are of.
_GROUPS = {"embd": "embedding", "pos_embd": "position embedding"}
WORLD = "world"


@dataclass(frozen=True)
class Collective:
    """One call.

    Attributes:
        operation: all_reduce, all_gather, reduce_scatter, broadcast, all_to_all, send, receive, ...
        group: tp, pp, dp, embedding, ...; world: all ranks.
        size: ranks of the group.
        shape: of the tensor; of what is gathered or scattered, the whole one.
        dtype: name of it.
        nbytes: of that tensor.
        kept: bytes of it that this rank sends to itself, where ranks get different shares.
    """

    operation: str
    group: str
    size: int
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    kept: int | None = None

    @property
    def sent(self) -> float:
        """Bytes that a rank sends, by the algorithm that sends least.

        With n ranks and B bytes: all_reduce 2 B (n - 1) / n; all_gather and reduce_scatter
        B (n - 1) / n of the whole; broadcast as much, the mean over the ranks; all_to_all what is
        not for this rank; send B.
        """
        share = (self.size - 1) / self.size
        if self.operation == "all_reduce":
            return 2 * share * self.nbytes
        if self.kept is not None:
            return float(self.nbytes - self.kept)
        if self.operation in ("all_gather", "reduce_scatter", "broadcast", "all_to_all"):
            return share * self.nbytes
        return float(self.nbytes) if self.operation == "send" else 0.0


def group_names(pg_collection: ProcessGroupCollection) -> dict[str, str]:
    """Short names of the groups, by PyTorch's; a group that has several fields has the first."""
    world = dist.group.WORLD
    assert world is not None
    names: dict[str, str] = {world.group_name: WORLD}
    for field in fields(pg_collection):
        group = getattr(pg_collection, field.name, None)
        if isinstance(group, dist.ProcessGroup):
            names.setdefault(group.group_name, _GROUPS.get(field.name, field.name))
    return names


class Tracer(TorchDispatchMode):
    """Inside, `collectives` gets a record of each call, in their order.

    Args:
        names: of the groups, from `group_names`; others are called by their size.
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        super().__init__()
        self.names = names
        self.collectives: list[Collective] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """See PyTorch's class."""
        if func.namespace == NAMESPACE:
            self.collectives += records(func, args, self.names)
        return func(*args, **(kwargs or {}))


def records(func: Any, args: tuple[Any, ...], names: Mapping[str, str]) -> list[Collective]:
    """What a call of an operator exchanges: a record a tensor; a barrier has none.

    Args:
        func: operator of `NAMESPACE`.
        args: of the call.
        names: see `Tracer`.
    """
    name = func._schema.name.partition("::")[2]
    if name == "barrier":  # its tensor is a stand-in
        return []
    operation = _NAMES.get(name, name)
    group = next(g for g in map(_as_group, args) if g is not None)
    found = [list(_tensors(argument)) for argument in args]
    given = [tensors for tensors in found if tensors]
    if not given:
        return []
    # The first is written, the second read; the larger one is the whole.
    whole = max(given, key=lambda tensors: sum(tensor.nbytes for tensor in tensors))
    size, kept = group.size(), None
    if operation == "all_to_all":  # what is sent counts, and there may be less of it
        (whole,) = given[1:2]
        splits = args[4]
        if splits:
            kept = splits[group.rank()] * (whole[0].nbytes // max(1, len(whole[0])))
    return [
        Collective(
            operation=operation,
            group=names.get(group.group_name, f"{size} ranks"),
            size=size,
            shape=tuple(tensor.shape),
            dtype=str(tensor.dtype).removeprefix("torch."),
            nbytes=tensor.nbytes,
            kept=kept,
        )
        for tensor in whole
    ]


def _as_group(argument: Any) -> dist.ProcessGroup | None:
    if not isinstance(argument, torch.ScriptObject):
        return None
    try:
        return dist.ProcessGroup.unbox(argument)
    except RuntimeError:  # a reduction, say
        return None


def _tensors(argument: Any) -> Iterable[torch.Tensor]:
    if isinstance(argument, torch.Tensor):
        yield argument
    elif isinstance(argument, list | tuple):
        for part in argument:
            yield from _tensors(part)
