"""What the pool's workers run: a training run on every rank of a world."""

from __future__ import annotations

import contextlib
import functools
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dattn_mcore.config.checks import check_config, data_parallel_size
from dattn_mcore.config.load import from_dict
from dattn_mcore.config.schema import Config
from dattn_mcore.parallel.groups import initialize_model_parallel
from dattn_mcore.training.loop import train


def start(tree: dict[str, Any]) -> tuple[Config, Any]:
    """Checks the configuration and creates its process groups."""
    config = from_dict(tree)
    check_config(config)
    data_parallel_size(config, dist.get_world_size())
    sizes = config.parallel
    groups = initialize_model_parallel(
        seed=config.train.seed, tp=sizes.tp, pp=sizes.pp, vpp=sizes.vpp, cp=sizes.cp
    )
    return config, groups


def run_training(tree: dict[str, Any]) -> bool:
    """The whole training loop; True if it reached its last step."""
    config, groups = start(tree)
    return train(config, groups, torch.device("cpu"))


def run_training_of_rank(trees: list[dict[str, Any]]) -> bool:
    """The whole training loop; each rank has a configuration of its own."""
    return run_training(trees[dist.get_rank()])


def read_metrics(run_dir: str | Path, name: str = "metrics") -> list[dict[str, Any]]:
    """Rows of a run's metrics.jsonl, or of another file of the same form."""
    text = (Path(run_dir) / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def run_training_with_log(tree: dict[str, Any]) -> tuple[bool, str]:
    """Like `run_training`; also returns what was logged."""
    import io
    import logging

    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger("dattn_mcore")
    logger.addHandler(handler)
    before = logger.level
    logger.setLevel(logging.INFO)
    try:
        return run_training(tree), stream.getvalue()
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)


def train_without_last_save(tree: dict[str, Any]) -> bool:
    """The training loop alone: the save at its end takes as long as its steps here.

    Where gradients are reduced while backward goes on, their buckets are so small that there are
    many of them.
    """
    from unittest import mock

    from dattn_mcore.checkpoint.save import CheckpointSaver
    from dattn_mcore.training import optimizer

    small = functools.partial(optimizer.DistributedDataParallelConfig, bucket_size=2000)
    overlaps = tree.get("parallel", {}).get("overlap_grad_reduce", False)
    with (
        mock.patch.object(CheckpointSaver, "save", lambda saver, step, **kwargs: None),
        mock.patch.object(optimizer, "DistributedDataParallelConfig", small)
        if overlaps
        else contextlib.nullcontext(),
    ):
        return run_training(tree)
