"""The files of a checkpoint, the same ones under every release of Megatron-Core.

`megatron.core.dist_checkpointing.save` cannot write them. From 0.19 on it puts what is no tensor
into a byte entry of the index, and has no argument against that: 0.16 to 0.18 do not look for the
entry, and PyTorch unpickles it unasked. The readers of all releases take `common.pt` where there is
one. So `begin_save` does what that function does, with the same strategy for the shards.
tests/megatron fails once all releases that are allowed write without the entry.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
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
    return request
