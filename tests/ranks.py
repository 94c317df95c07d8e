"""Ranks as a launcher would start them, forked from a server that has imported the packages once.

What such a rank costs is its work, not its imports, which take longer than most tests' work.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PRELOAD = [
    "tests.conftest",  # what a test process does before it imports Megatron-Core
    "dattn_mcore.training.loop",
    "dattn_mcore.parallel.platform",
    "dattn_mcore.evaluation.run",
    "dattn_mcore.evaluation.__main__",
]


def forks() -> Any:
    """The server's context; a test session has one server, so all agree on what it imports."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def free_port() -> int:
    """A port that was free a moment ago: runs of other tests do not meet on a default."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_ranks(
    program: Callable[..., int], arguments: list[tuple[Any, ...]], folder: Path
) -> list[Any]:
    """Starts a program on as many ranks as there are arguments, with torchrun's environment.

    Args:
        program: called with a rank's arguments; returns its exit status.
        arguments: of each rank.
        folder: where each rank's output goes (`rank0.log`, ...).
    """
    folder.mkdir(parents=True, exist_ok=True)
    context, port = forks(), free_port()
    ranks = []
    for rank, own in enumerate(arguments):
        where = {
            **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(arguments))},
            "LOCAL_WORLD_SIZE": str(len(arguments)),
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"},
        }
        log = folder / f"rank{rank}.log"
        process = context.Process(target=_rank, args=(where, log, program, own))
        process.start()
        ranks.append(process)
    return ranks


def end_ranks(ranks: list[Any]) -> None:
    """SIGKILL to each that is left."""
    for process in ranks:
        process.kill()
        process.join()


def _rank(
    where: dict[str, str], log: Path, program: Callable[..., int], arguments: tuple[Any, ...]
) -> None:
    os.environ.update(where)
    output = open(log, "w", buffering=1)  # noqa: SIM115
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout = sys.stderr = output
    sys.exit(program(*arguments))
