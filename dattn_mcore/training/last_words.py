"""What a rank says when it must end: one line for a lost rank, for too little memory, for a fault.

An error that all ranks know goes through `agreement`. These are of one rank alone: the others are
in a collective by then, and learn of it because their own collective fails.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from dattn_mcore.errors import (
    DataError,
    DattnError,
    FaultError,
    LostRankError,
    OutOfMemoryError,
    RankError,
)
from dattn_mcore.parallel.out_of_memory import is_out_of_memory
from dattn_mcore.training.watchdog import Lost, Watchdog

_SHOWN = 200  # characters of a library's message
_NAMED = 8  # ranks
# A file system or device failed; with another start, or on another machine, it may not.
_FAULTS = (errno.EIO, errno.ESTALE, errno.ENODEV, errno.EREMOTEIO, errno.ETIMEDOUT)


def reason_of(error: BaseException) -> str:
    """Type and message of an error, in one line."""
    text = " ".join(str(error).split())[:_SHOWN]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def this_rank() -> str:
    """Number and host."""
    return f"rank {dist.get_rank()} on {socket.gethostname()}"


@contextlib.contextmanager
def speaking(watchdog: Watchdog) -> Iterator[None]:
    """Turns what ends this rank alone into one line, and tells the other ranks why it ends.

    Raises:
        OutOfMemoryError: an allocation failed in the block.
        LostRankError: the block failed, and another rank has ended.
    """
    try:
        yield
    except DattnError as error:
        if isinstance(error, OutOfMemoryError):
            watchdog.ended("out of memory")
        elif isinstance(error, RankError):
            watchdog.ended(reason_of(error))
        raise
    except Exception as error:
        if watchdog.has_ended:  # reported by an inner block
            raise
        doing = watchdog.doing
        if is_out_of_memory(error):
            message = (
                f"{this_rank()} is out of memory in {doing} ({reason_of(error)}); divide the model "
                "over more processes (--tp, --pp), or use machines with more memory"
            )
            watchdog.ended("out of memory")
            raise OutOfMemoryError(message) from error
        lost = watchdog.lost()
        if lost:
            raise _lost_ranks(lost, doing) from error
        watchdog.ended(reason_of(error))  # a defect: its traceback is this rank's
        raise


def unexpected(error: Exception, doing: str, run_dir: Path) -> DattnError:
    """One line for an error that nobody foresaw; its traceback goes into the run's folder.

    Args:
        error: it.
        doing: what failed, as a sentence's subject: `loading the data of step 3`.
        run_dir: of the run.
    """
    path = run_dir / f"traceback_rank{dist.get_rank()}.txt"
    where = ""
    with contextlib.suppress(OSError):
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        where = f"; the traceback is in {path}"
    message = f"{doing} failed ({reason_of(error)}){where}"
    if is_out_of_memory(error):
        return DattnError(f"{message}; lower data.prefetch, data.decode_threads or the batch")
    if isinstance(error, OSError) and error.errno in _FAULTS:
        return FaultError(message)
    return DataError(message)


def _lost_ranks(lost: list[Lost], doing: str) -> LostRankError:
    """The error of a rank that goes on alone; the lowest of those that are left speaks."""
    gone = {item.rank for item in lost}
    named = [
        f"rank {item.rank}{f' on {item.host}' if item.host else ''} ended ({item.last})"
        for item in lost[:_NAMED]
    ]
    more = f" and {len(lost) - _NAMED} more" if len(lost) > _NAMED else ""
    left = [rank for rank in range(dist.get_world_size()) if rank not in gone]
    return LostRankError(
        f"{', '.join(named)}{more} while {this_rank()} was in {doing}; look at the first one's "
        "log, and start again to go on from the newest checkpoint",
        speaks=dist.get_rank() == left[0] and not any(item.spoke for item in lost),
    )
