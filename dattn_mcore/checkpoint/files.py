"""The files of a checkpoint, the same ones under every release of Megatron-Core.

From megatron-core 0.19 on, `dist_checkpointing.save` puts what is no tensor into a byte entry of
the index, which 0.16 to 0.18 do not look for and PyTorch unpickles unasked. Its readers take
`common.pt` wherever there is one. So only the shards are left to Megatron-Core here.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess

from dattn_mcore.checkpoint.content import COMMON, write_backend


def begin_save(content: dict[str, Any], folder: Path, strategy: Any) -> Any:
    """Writes what is no tensor; returns Megatron-Core's request that writes the shards.

    Args:
        content: sharded tensors and plain values.
        folder: empty, and there.
        strategy: Megatron-Core's, which writes shards.

    Raises:
        OSError: a file could not be written.
    """
    sharded, common = save_preprocess(content)
    if dist.get_rank() == 0:
        torch.save(common, folder / COMMON)
    arguments: tuple[Any, ...] = (sharded, folder)
    if "async_strategy" in inspect.signature(strategy.async_save).parameters:  # from 0.17 on
        arguments += ("mcore",)  # the other one is of a package that may be missing
    request = strategy.async_save(*arguments)

    def finish() -> None:
        if dist.get_rank() == 0:
            write_backend(folder)
        dist.barrier()

    request.finalize_fns.append(finish)
    return request
