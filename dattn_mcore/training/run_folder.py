"""One run at a time writes into a run folder, and notices when the folder is taken away."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist

from dattn_mcore.errors import ConfigError
from dattn_mcore.training.agreement import agree

logger = logging.getLogger(__name__)

LOCK = ".lock"
# A run that was ended a moment ago may still be saving, and NFS keeps a lost node's locks for 90 s.
PATIENCE_SECONDS = 120.0


class Claim:
    """A run folder while a run writes into it. Ranks without the lock see nothing wrong.

    Args:
        run_dir: the folder.
        held: its lock, on rank 0; None where the file system knows none.
        watches: whether this rank looks after the folder.
    """

    def __init__(self, run_dir: Path, held: IO[str] | None, watches: bool) -> None:
        self.run_dir, self._lock = run_dir, held
        self._known: os.stat_result | None = None
        self._found = "here"
        if watches:
            with contextlib.suppress(OSError):
                self._known = os.fstat(held.fileno()) if held else os.stat(run_dir)

    def is_gone(self) -> bool:
        """Whether the folder was deleted, moved, or replaced by another one."""
        return self._state() != "here"

    def is_anothers(self) -> bool:
        """Whether there is another folder in its place, into which this run must not write."""
        return self._state() == "replaced"

    def problem(self) -> ConfigError | None:
        """The error that ends the run, where the folder is gone."""
        if not self.is_gone():
            return None
        if self.is_anothers():
            what = "another folder is in its place, and nothing was saved there; choose another"
            return ConfigError(f"{self._gone()}; {what} log.run_dir")
        return ConfigError(
            f"{self._gone()}; its metrics, samples and settings are not there any more. A "
            "checkpoint of the last step was saved there anew: start again to go on from it"
        )

    def _gone(self) -> str:
        return f"log.run_dir={self.run_dir} was deleted or moved while the run wrote into it"

    def _state(self) -> str:
        """What was found first: a save into a folder that is gone makes it again."""
        if self._found == "here" and self._known is not None:
            try:
                now = os.stat(self.run_dir / LOCK if self._lock else self.run_dir)
                if not os.path.samestat(now, self._known):
                    self._found = "replaced"
            except (FileNotFoundError, NotADirectoryError):
                self._found = "gone"
            except OSError:  # a network file system that is not there for a moment
                pass
        return self._found


@contextlib.contextmanager
def claimed(run_dir: Path, device: torch.device) -> Iterator[Claim]:
    """Holds the run folder while the block runs; called by all ranks, rank 0 holds it.

    The kernel lets go when the process ends, however it ends. Where the file system knows no locks,
    the run goes on without.

    Raises:
        ConfigError: on every rank; another run holds it.
    """
    held, problem = None, None
    if dist.get_rank() == 0:
        try:
            held = _lock(run_dir)
        except ConfigError as error:
            problem = error
    try:
        agree(problem, device)
        yield Claim(run_dir, held, watches=dist.get_rank() == 0)
    finally:
        if held is not None:
            held.close()


def _lock(run_dir: Path) -> IO[str] | None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / LOCK).open("a+", encoding="utf-8")
    except OSError:
        return None  # reported by check_checkpoint_folder
    end = None
    while True:
        try:
            # A record lock, because processes that this one forks do not inherit it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                logger.warning("%s cannot be locked (%s)", run_dir, error.strerror)
                file.close()
                return None
            file.seek(0)
            holder = file.read().strip() or "another run"
            if end is None:
                end = time.monotonic() + PATIENCE_SECONDS
                logger.info("waiting for %s, which writes into %s", holder, run_dir)
            if time.monotonic() > end:
                file.close()
                raise ConfigError(
                    f"log.run_dir={run_dir} is being written by {holder}; end that run, or choose "
                    "another log.run_dir"
                ) from None
            time.sleep(0.5)
        else:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            return file
