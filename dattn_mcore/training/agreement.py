"""All ranks decide together whether to go on, so that none waits for one that has stopped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dattn_mcore.data.failures import SampleFailure
from dattn_mcore.errors import CheckpointError, ConfigError, DataError, DattnError

_KINDS: tuple[type[DattnError], ...] = (DattnError, ConfigError, DataError, CheckpointError)


@dataclass(frozen=True)
class Agreement:
    """What all ranks know after talking.

    Attributes:
        stop: whether any rank wants to stop.
        failures: samples that any rank could not read or decode, each once.
    """

    stop: bool
    failures: tuple[SampleFailure, ...]


def agree(
    error: DattnError | None,
    stop: bool,
    device: torch.device,
    failures: Sequence[SampleFailure] = (),
) -> Agreement:
    """Exchanges this rank's mistake, wish to stop and failed samples with all others.

    Args:
        error: what went wrong here; None where nothing did.
        stop: whether this process received a stopping signal.
        device: where the exchanged flags live.
        failures: samples of this rank that could not be read or decoded.

    Returns:
        The same on every rank.

    Raises:
        DattnError: on every rank, the mistake of the lowest rank that has one.
    """
    flags = torch.tensor([int(error is not None), int(stop), int(bool(failures))], device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    if flags[0]:
        mine = None if error is None else (_KINDS.index(type(error)), str(error))
        everyone: list[tuple[int, str] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        kind, message = next(item for item in everyone if item is not None)
        raise _KINDS[kind](message)
    if not flags[2]:
        return Agreement(bool(flags[1]), ())
    found: list[Sequence[SampleFailure]] = [()] * dist.get_world_size()
    dist.all_gather_object(found, tuple(failures))
    return Agreement(bool(flags[1]), unique(item for part in found for item in part))


def unique(failures: Iterable[SampleFailure]) -> tuple[SampleFailure, ...]:
    """Each failed sample once, in order; the ranks of a replica find the same ones."""
    first: dict[int, SampleFailure] = {}
    for failure in sorted(failures, key=lambda f: (f.sample, f.path or "", f.stage, f.reason)):
        first.setdefault(failure.sample, failure)
    return tuple(first.values())
