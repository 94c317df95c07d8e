"""All ranks decide together whether to go on, so that none waits for one that has stopped."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dattn_mcore.data.sample_failure import SampleFailure
from dattn_mcore.errors import KINDS, DattnError, kind_of


@dataclass(frozen=True)
class Agreement:
    """What all ranks agreed on.

    Attributes:
        stop: whether any rank wants to stop.
        failures: samples that any rank could not read or decode, each once.
        data_wait: longest time that a rank waited for data, in seconds.
        peak_memory: largest peak of device memory of a rank, in bytes.
    """

    stop: bool
    failures: tuple[SampleFailure, ...]
    data_wait: float
    peak_memory: int


def agree(
    error: DattnError | None,
    device: torch.device,
    *,
    stop: bool = False,
    failures: Sequence[SampleFailure] = (),
    data_wait: float = 0.0,
    peak_memory: int = 0,
) -> Agreement:
    """Exchanges this rank's mistake, wish to stop and failed samples with all others.

    Args:
        error: what went wrong here; None where nothing did.
        device: where the exchanged flags live.
        stop: whether this process received a stopping signal.
        failures: samples of this rank that could not be read or decoded.
        data_wait: seconds this rank waited for data.
        peak_memory: bytes of device memory at this rank's peak.

    Returns:
        The same on every rank.

    Raises:
        DattnError: on every rank, the mistake of the lowest rank that has one; it names rank and
            host where not all ranks made it.
    """
    mine = [
        int(error is not None),
        int(stop),
        int(bool(failures)),
        round(data_wait * 1e6),
        peak_memory,
    ]
    flags = torch.tensor(mine, device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    mistaken, wants_stop, any_failed, microseconds, memory = flags.tolist()
    if mistaken:
        raise _first_mistake(error)
    found: list[Sequence[SampleFailure]] = [()] * dist.get_world_size()
    if any_failed:
        dist.all_gather_object(found, tuple(failures))
    everyones = unique(item for part in found for item in part)
    return Agreement(bool(wants_stop), everyones, microseconds / 1e6, memory)


def _first_mistake(error: DattnError | None) -> DattnError:
    mine = None
    if error is not None:
        mine = kind_of(error), str(error), socket.gethostname()
    everyone: list[tuple[int, str, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    failed = [rank for rank, item in enumerate(everyone) if item is not None]
    kind, message, host = next(item for item in everyone if item is not None)
    if len(failed) < len(everyone):
        others = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        message = f"{message} (rank {failed[0]} on {host}{others})"
    return KINDS[kind](message)


def unique(failures: Iterable[SampleFailure]) -> tuple[SampleFailure, ...]:
    """Each failed sample once, in order; the ranks of a replica find the same ones."""
    first: dict[int, SampleFailure] = {}
    for failure in sorted(failures, key=lambda f: (f.sample, f.path or "", f.stage, f.reason)):
        first.setdefault(failure.sample, failure)
    return tuple(first.values())
