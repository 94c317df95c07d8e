"""A function on several processes of this machine's CPU, which form a process group."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from dattn_mcore.parallel import platform


def on_ranks(job: Callable[..., Any], ranks: int, **arguments: Any) -> list[Any]:
    """Runs a function on every rank of a new world, one thread each.

    Args:
        job: of a module, so that a new process finds it.
        ranks: processes.
        **arguments: of the function, the same on all ranks.

    Returns:
        Its results by rank.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank raised; the others are ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(
            _rank, args=(ranks, folder, job, arguments), nprocs=ranks, join=True
        )
        files = [Path(folder) / f"rank{rank}" for rank in range(ranks)]
        return [pickle.loads(file.read_bytes()) for file in files]


def _rank(
    rank: int, ranks: int, folder: str, job: Callable[..., Any], arguments: dict[str, Any]
) -> None:
    torch.set_num_threads(1)
    platform.install("cpu")
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group(platform.backend("cpu"), store=store, rank=rank, world_size=ranks)
    result = job(**arguments)
    (Path(folder) / f"rank{rank}").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
