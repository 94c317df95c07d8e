"""Ranks that have a release of Transformer Engine, forked from a server that has imported it once."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.distributed.pool import WorkerError

ROOT = Path(__file__).parents[2]


class TePool:
    """As `tests.distributed.pool.Pool`; each job has processes of its own.

    Args:
        folder: of the release (`tests.te.releases.folder_of`).
    """

    def __init__(self, folder: Path) -> None:
        self.server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.te.pool", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )

    def run(self, job: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
        """Runs `job(*args)` on every rank of a fresh world and returns the results by rank.

        Raises:
            WorkerError: what the lowest failing rank raised.
        """
        assert self.server.stdin is not None and self.server.stdout is not None
        pickle.dump((job.__module__, job.__name__, world_size, args), self.server.stdin)
        self.server.stdin.flush()
        results = pickle.load(self.server.stdout)
        for ok, result in results:
            if not ok:
                raise WorkerError(*result)
        return [result for _, result in results]

    def close(self) -> None:
        """Ends the server."""
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait()


def _work(folder: str, rank: int, job: tuple[str, str, int, tuple[Any, ...]]) -> None:
    """One rank; leaves its result in a file."""
    import importlib

    import torch.distributed as dist

    from dattn_mcore.parallel import platform

    module, name, world_size, args = job
    try:
        platform.install("cpu")
        store = dist.FileStore(f"{folder}/store", world_size)
        backend = platform.backend("cpu")
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
        result = (True, getattr(importlib.import_module(module), name)(*args))
    except BaseException as error:  # noqa: BLE001 (sent to the test)
        result = (False, (type(error), str(error), traceback.format_exc()))
    with open(f"{folder}/result{rank}", "wb") as file:
        pickle.dump(result, file)


def _run(job: tuple[str, str, int, tuple[Any, ...]]) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(job[2]):
            child = os.fork()
            if child == 0:
                _work(folder, rank, job)
                os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
        results = []
        for rank in range(job[2]):
            try:
                results.append(pickle.loads(Path(f"{folder}/result{rank}").read_bytes()))
            except (OSError, EOFError):
                results.append((False, (ChildProcessError, f"rank {rank} died", "")))
        return results


def main(folder: str) -> None:
    """Serves jobs until its input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    from tests.te import compiled_module

    compiled_module.install(Path(folder))
    # What a test process does before it imports Megatron-Core: it finds the package above.
    import dattn_mcore.training.loop  # noqa: F401  (import once, then fork)
    import tests.conftest  # noqa: F401

    while True:
        try:
            job = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(_run(job), answers)
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
