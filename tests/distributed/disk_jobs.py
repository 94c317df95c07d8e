"""What the pool's workers run where a disk is full, or a run folder is taken away."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dattn_mcore.checkpoint.save import CheckpointSaver
from dattn_mcore.errors import CheckpointError, DattnError
from dattn_mcore.training import loop
from tests.distributed.jobs import run_training


def train_without_folder(tree: dict[str, Any], step: int, how: str) -> str:
    """Trains; in a step the run folder is taken away on rank 0.

    Args:
        tree: configuration.
        step: 1-based.
        how: deleted, moved, or replaced by another run's.

    Returns:
        What the run raised.
    """
    original, run_dir = loop.train_step, Path(tree["log"]["run_dir"])

    def counted(*args: Any) -> Any:
        counted.calls += 1
        if counted.calls == step and dist.get_rank() == 0:
            run_dir.rename(run_dir.with_name("elsewhere"))
            if how != "moved":
                shutil.rmtree(run_dir.with_name("elsewhere"))
            if how == "replaced":
                run_dir.mkdir()
                (run_dir / ".lock").write_text("process 1 on another host")
        return original(*args)

    counted.calls = 0
    loop.train_step = counted
    try:
        run_training(tree)
    except DattnError as error:
        return str(error)
    finally:
        loop.train_step = original
    return ""


def train_on_a_full_disk(tree: dict[str, Any], rank: int, limit: int, since: str = "save") -> str:
    """Trains; from the first save or step on, one rank can write no file beyond a size.

    Returns:
        What the run raised.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    owner, name = (CheckpointSaver, "save") if since == "save" else (loop, "train_step")
    original = getattr(owner, name)

    def limited(*args: Any, **kwargs: Any) -> Any:
        if dist.get_rank() == rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        return original(*args, **kwargs)

    setattr(owner, name, limited)
    try:
        run_training(tree)
    except CheckpointError as error:
        return str(error)
    finally:
        setattr(owner, name, original)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return ""
