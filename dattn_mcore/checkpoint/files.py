"""The files of a checkpoint, the same ones under every release of Megatron-Core.

`megatron.core.dist_checkpointing.save` cannot write them. From 0.19 on it puts what is no tensor
into a byte entry of the index, and has no argument against that: 0.16 to 0.18 do not look for the
entry, and PyTorch unpickles it unasked. The readers of all releases take `common.pt` where there is
one. So `begin_save` does what that function does, with the same strategy for the shards.
tests/megatron fails once all releases that are allowed write without the entry.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from dattn_mcore.checkpoint.content import COMMON, write_backend

FILES_OF_A_RANK = 2  # at most; Megatron-Core's own number until 0.16, then 1


def begin_save(content: dict[str, Any], folder: Path, replicas: dist.ProcessGroup) -> Any:
    """Writes what is no tensor; returns Megatron-Core's request that writes the shards.

    Args:
        content: sharded tensors and plain values.
        folder: empty, and there.
        replicas: ranks that hold the same weights; each writes a part of them.

    Raises:
        OSError: a file could not be written.
    """
    strategy: Any = TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=FILES_OF_A_RANK)
    if replicas.size() > 1:
        strategy = FullyParallelSaveStrategyWrapper(strategy, replicas)
    sharded, common = save_preprocess(content)
    if dist.get_rank() == 0:
        torch.save(common, folder / COMMON)
    options = {}
    if "async_strategy" in inspect.signature(strategy.async_save).parameters:  # from 0.17 on
        options["async_strategy"] = "mcore"  # the other one is of a package that may be missing
    request = strategy.async_save(sharded, folder, **options)

    def finish() -> None:
        if dist.get_rank() == 0:
            write_backend(folder)
        dist.barrier()

    request.finalize_fns.append(finish)
    if request.async_fn is None:  # this rank has nothing to write
        return request
    return request._replace(async_fn=functools.partial(_write, request.async_fn))


def _write(write: Callable[..., None], rank: int, shards: Any, results: Any) -> None:
    """Has Megatron-Core write this rank's shards; `results` gets what was written, or why not.

    From 0.17 on, of an exception it keeps the type alone, its log has the rest; and the exception
    of one file of several ends this rank, for which the others would wait.
    """
    said: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            said.append(record.getMessage())
        return record.levelno < logging.ERROR

    log = logging.getLogger(filesystem_async.__name__)
    log.addFilter(keep)
    try:
        write(rank, shards, results)
        written = results.get()
    except Exception as error:  # noqa: BLE001 (all ranks raise it, when they ask for the results)
        written = RuntimeError(f"{type(error).__name__}: {error}")
    finally:
        log.removeFilter(keep)
    if isinstance(written, Exception) and said:
        written = RuntimeError(said[0].partition("error: ")[2] or said[0])
    results.put(written)
