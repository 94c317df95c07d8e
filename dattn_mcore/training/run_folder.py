"""One run at a time writes into a run folder."""

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


@contextlib.contextmanager
def claimed(run_dir: Path, device: torch.device) -> Iterator[None]:
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
        agree(problem, False, device)
        yield
    finally:
        if held is not None:
            held.close()


def _lock(run_dir: Path) -> IO[str] | None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / LOCK).open("a+", encoding="utf-8")
    except OSError:
        return None  # told by check_checkpoint_folder
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
