"""All ranks decide together whether to go on, so that none waits for one that has stopped."""

from __future__ import annotations

import torch
import torch.distributed as dist

from dattn_mcore.errors import CheckpointError, ConfigError, DataError, DattnError

_KINDS: tuple[type[DattnError], ...] = (DattnError, ConfigError, DataError, CheckpointError)


def agree(error: DattnError | None, stop: bool, device: torch.device) -> bool:
    """Exchanges this rank's mistake and wish to stop with all others.

    Args:
        error: what went wrong here; None where nothing did.
        stop: whether this process received a stopping signal.
        device: where the exchanged flags live.

    Returns:
        Whether any rank wants to stop.

    Raises:
        DattnError: on every rank, the mistake of the lowest rank that has one.
    """
    flags = torch.tensor([int(error is not None), int(stop)], device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    if flags[0]:
        mine = None if error is None else (_KINDS.index(type(error)), str(error))
        everyone: list[tuple[int, str] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        kind, message = next(item for item in everyone if item is not None)
        raise _KINDS[kind](message)
    return bool(flags[1])
