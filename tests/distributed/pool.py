"""One pool of CPU workers for the whole test session: a multi-process test is one call.

The workers are forked from a server that has imported PyTorch and Megatron-Core once, so that a
job costs the creation of its process groups and nothing more.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

from tests.ranks import forks

JOBS_PER_WORKER = 50  # what a job leaves behind must not add up


def _worker(connection: Any, rank: int) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import warnings

    warnings.filterwarnings("ignore")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    from dattn_mcore.parallel import platform

    platform.install("cpu")
    while True:
        job = connection.recv()
        if job is None:
            return
        module, name, world_size, store_path, args = job
        try:
            store = dist.FileStore(store_path, world_size)
            dist.init_process_group(
                platform.backend("cpu"), store=store, rank=rank, world_size=world_size
            )
            try:
                result = getattr(importlib.import_module(module), name)(*args)
                connection.send((True, result))
            finally:
                from megatron.core import parallel_state

                parallel_state.destroy_model_parallel()
                _free_groups()
                dist.destroy_process_group()
        except BaseException as error:  # noqa: BLE001 (sent to the test)
            connection.send((False, (type(error), str(error), traceback.format_exc())))


def _free_groups() -> None:
    """Lets go of models and optimizers, which hold groups.

    A group has threads that wake up a hundred times a second. Megatron-Core's optimizer is part of a
    circle that Python's collector cannot see, so it is cut open.
    """
    from megatron.core.optimizer.optimizer import MegatronOptimizer

    for one in gc.get_objects():
        if isinstance(one, MegatronOptimizer):
            vars(one).clear()
    gc.collect()


class WorkerError(Exception):
    """A worker raised; `kind` is the type of what it raised and the message is its own."""

    def __init__(self, kind: type, message: str, trace: str) -> None:
        super().__init__(f"{kind.__name__}: {message}\n{trace}")
        self.kind, self.message = kind, message


class Pool:
    """Workers by rank, started as they are needed."""

    def __init__(self) -> None:
        self.context = forks()
        self.workers: list[tuple[Any, Any]] = []
        self.jobs = 0

    def run(self, job: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240):
        """Runs `job(*args)` on every rank of a fresh world and returns the results by rank.

        Raises:
            WorkerError: what the lowest failing rank raised.
            TimeoutError: a rank did not answer in time; the pool is started anew.
        """
        if self.jobs == JOBS_PER_WORKER:
            self.close()
        self.jobs += 1
        while len(self.workers) < world_size:
            here, there = self.context.Pipe()
            process = self.context.Process(
                target=_worker, args=(there, len(self.workers)), daemon=False
            )
            process.start()
            self.workers.append((process, here))
        with tempfile.TemporaryDirectory() as folder:
            store = os.path.join(folder, "store")
            for _, connection in self.workers[:world_size]:
                connection.send((job.__module__, job.__name__, world_size, store, args))
            results = []
            for rank, (_, connection) in enumerate(self.workers[:world_size]):
                if not connection.poll(timeout):
                    self.close()
                    raise TimeoutError(f"rank {rank} of {job.__name__} gave no answer")
                results.append(connection.recv())
        for ok, result in results:
            if not ok:
                self.close()  # a failed job may leave a rank in any state
                raise WorkerError(*result)
        return [result for _, result in results]

    def close(self) -> None:
        """Ends all workers."""
        for _, connection in self.workers:
            with contextlib.suppress(OSError):
                connection.send(None)
            connection.close()
        for process, _ in self.workers:
            process.join(5)
            process.kill()
            process.join()
        self.workers, self.jobs = [], 0
