"""All ranks decide together whether to go on, so that none waits for one that has stopped."""

from __future__ import annotations

import socket
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dattn_mcore.errors import CheckpointError, ConfigError, DataError, DattnError

_KINDS: tuple[type[DattnError], ...] = (DattnError, ConfigError, DataError, CheckpointError)


@dataclass(frozen=True)
class Agreement:
    """What all ranks agreed on.

    Attributes:
        stop: whether any rank wants to stop.
        data_wait: longest time that a rank waited for data, in seconds.
        peak_memory: largest peak of device memory of a rank, in bytes.
    """

    stop: bool
    data_wait: float
    peak_memory: int


def agree(
    error: DattnError | None,
    stop: bool,
    device: torch.device,
    *,
    data_wait: float = 0.0,
    peak_memory: int = 0,
) -> Agreement:
    """Exchanges this rank's mistake and wish to stop with all others.

    Args:
        error: what went wrong here; None where nothing did.
        stop: whether this process received a stopping signal.
        device: where the exchanged flags live.
        data_wait: seconds this rank waited for data.
        peak_memory: bytes of device memory at this rank's peak.

    Raises:
        DattnError: on every rank, the mistake of the lowest rank that has one; it names rank and
            host where not all ranks made it.
    """
    mine = [int(error is not None), int(stop), round(data_wait * 1e6), peak_memory]
    flags = torch.tensor(mine, device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    failed, wants_stop, microseconds, memory = flags.tolist()
    if failed:
        raise _first_mistake(error)
    return Agreement(bool(wants_stop), microseconds / 1e6, memory)


def _first_mistake(error: DattnError | None) -> DattnError:
    mine = None
    if error is not None:
        mine = _KINDS.index(type(error)), str(error), socket.gethostname()
    everyone: list[tuple[int, str, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    failed = [rank for rank, item in enumerate(everyone) if item is not None]
    kind, message, host = next(item for item in everyone if item is not None)
    if len(failed) < len(everyone):
        others = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        message = f"{message} (rank {failed[0]} on {host}{others})"
    return _KINDS[kind](message)
