"""Writes a checkpoint under a temporary name and renames it when it is whole."""

from __future__ import annotations

import json
import os
import queue
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

import dattn_mcore
from dattn_mcore.checkpoint import folders, state
from dattn_mcore.config.load import to_dict
from dattn_mcore.config.schema import Config
from dattn_mcore.errors import CheckpointError
from dattn_mcore.models.dattn import DattnModel


def save_checkpoint(
    root: Path,
    step: int,
    config: Config,
    chunks: list[DattnModel],
    optimizer: MegatronOptimizer,
    pg_collection: ProcessGroupCollection,
    data_fingerprint: str,
) -> Path:
    """Saves model, optimizer, RNG and position; called by all ranks.

    Args:
        root: folder of checkpoints.
        step: optimizer steps done; also the position in the data.
        config: written into the checkpoint.
        chunks: this rank's model chunks, without DDP.
        optimizer: Megatron-Core's optimizer.
        pg_collection: process groups.
        data_fingerprint: of the data set the position refers to.

    Returns:
        The finished folder.

    Raises:
        CheckpointError: on every rank, if any could not write; older checkpoints stay intact.
    """
    final = folders.checkpoint_folder(root, step)
    temporary = final.with_suffix(".tmp")
    failure = None
    if dist.get_rank() == 0:
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        except OSError as error:
            failure = str(error)
    _raise_if_any(failure, final)
    layout = state.layout_of(pg_collection)
    model = state.model_state(chunks, pg_collection)
    content: dict[str, Any] = {
        **model,
        "optimizer": state.optimizer_state(optimizer, model, pg_collection, is_loading=False),
        "rng": state.rng_state(pg_collection, layout),
        "step": step,
    }
    strategy = get_default_save_sharded_strategy("torch_dist")
    if pg_collection.dp_cp.size() > 1:
        strategy = FullyParallelSaveStrategyWrapper(strategy, pg_collection.dp_cp)
    # A synchronous save collects its results within this process. Megatron-Core would start a
    # manager process for them on every rank, which imports everything again (seconds) and
    # outlives a rank that is killed.
    filesystem_async._results_queue = queue.Queue()
    try:
        dist_checkpointing.save(content, str(temporary), strategy)
    except Exception as error:  # noqa: BLE001 (disk full, permissions: reported on every rank)
        failure = f"{type(error).__name__}: {error}".splitlines()[0]
    _raise_if_any(failure, final)
    files = _describe(temporary)
    if dist.get_rank() == 0:
        manifest = {
            "format": folders.FORMAT,
            "step": step,
            "layout": list(layout),
            "data_fingerprint": data_fingerprint,
            "dattn_mcore": dattn_mcore.__version__,
            "config": to_dict(config),
            "files": files,
        }
        (temporary / folders.MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        folders.remove_old(root, config.checkpoint.keep)
    dist.barrier()
    return final


def _describe(folder: Path) -> dict[str, list[Any]]:
    """Size and SHA-256 of every file; ranks share the hashing."""
    names = folders.data_files(folder)
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = {
        name: [(folder / name).stat().st_size, folders.digest(folder / name)]
        for name in names[rank::world]
    }
    everyone: list[dict[str, list[Any]] | None] = [None] * world
    dist.all_gather_object(everyone, mine)
    return {name: entry for part in everyone if part for name, entry in sorted(part.items())}


def _raise_if_any(failure: str | None, target: Path) -> None:
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    for message in failures:
        if message is not None:
            raise CheckpointError(
                f"{target} could not be written ({message}); free space or choose another "
                "log.run_dir. Earlier checkpoints are intact"
            )
