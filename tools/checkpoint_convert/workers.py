"""Shares the tensors of a conversion among processes.

The processes are forks of the one that has read all headers and made all checks, so they start at
once and hold nothing twice. They talk to it through pipes only: bytes done, then a result or an
error. It alone shows progress, writes indices and renames the output.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch

from dattn_mcore.errors import CheckpointError, DattnError

Progress = Callable[[int, int], None]  # bytes done, bytes in all
Report = Callable[[int], None]  # bytes done since the last call
T = TypeVar("T")
Item = TypeVar("Item")


def in_shares(items: Sequence[Item], shares: int, size: Callable[[Item], int]) -> list[list[Item]]:
    """Splits items into shares of about the same size; none is empty, so there may be fewer.

    Each keeps the order, and all of them are at about the same place at the same time: together
    they read a disk from its one end to the other.
    """
    filled = [0] * max(1, min(shares, len(items)))
    result: list[list[Item]] = [[] for _ in filled]
    for item in items:
        least = min(range(len(filled)), key=filled.__getitem__)
        result[least].append(item)
        filled[least] += max(size(item), 1)
    return result


def run_shares(
    job: Callable[[int, Report], T], processes: int, total: int, progress: Progress
) -> list[T]:
    """Runs `job(share, report)` for every share, each in a process of its own if there are several.

    Args:
        job: what to do; inherited by the processes, not pickled. Its result is.
        processes: how many shares.
        total: bytes of all shares.
        progress: called in this process.

    Returns:
        The results by share.

    Raises:
        CheckpointError: what the first failing share raised, or that its process was killed. The
            other processes have ended then.
    """
    done = 0

    def report(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    if processes == 1:
        return [job(0, report)]
    context = multiprocessing.get_context("fork")
    workers: list[Any] = []
    waiting: dict[Any, int] = {}
    results: dict[int, T] = {}
    try:
        for share in range(processes):
            here, there = context.Pipe(duplex=False)
            worker = context.Process(target=_worker, args=(job, share, there, os.getpid()))
            worker.start()
            there.close()
            workers.append(worker)
            waiting[here] = share
        while waiting:
            for pipe in wait(list(waiting)):
                assert isinstance(pipe, Connection)
                share = waiting[pipe]
                try:
                    kind, content = pipe.recv()
                except EOFError:
                    raise CheckpointError(_how_it_ended(workers[share], share)) from None
                if kind == "progress":
                    report(content)
                    continue
                if kind != "result":
                    raise content
                results[share] = content
                del waiting[pipe]
    finally:
        for worker in workers:
            if len(results) < processes:
                worker.kill()
            worker.join()
    return [results[share] for share in range(processes)]


def _worker(job: Callable[[int, Report], Any], share: int, pipe: Connection, parent: int) -> None:
    for number in (signal.SIGINT, signal.SIGHUP):  # they reach the parent, which ends all
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)  # a fork has none of its parent's threads, but may think so

    def report(nbytes: int) -> None:
        if os.getppid() != parent:  # it was killed, nobody will finish the output
            os._exit(1)
        pipe.send(("progress", nbytes))

    try:
        pipe.send(("result", job(share, report)))
    except (DattnError, OSError) as error:
        pipe.send(("error", error))
    except BaseException:  # noqa: BLE001 (a defect: reported with its own traceback)
        pipe.send(("error", RuntimeError(f"process {share} failed:\n{traceback.format_exc()}")))


def _how_it_ended(worker: Any, share: int) -> str:
    worker.join()
    code = worker.exitcode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    return (
        f"converting process {share} (pid {worker.pid}) {how}; if memory ran out, give fewer "
        "--processes"
    )
