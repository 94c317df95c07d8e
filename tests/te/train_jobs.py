"""Runs of the training loop on Transformer Engine, and what its layers and optimizer were then."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

from dattn_mcore.checkpoint.content import FP8
from dattn_mcore.checkpoint.metadata import read_metadata
from tests.distributed.interrupted_jobs import train_until_killed
from tests.distributed.jobs import run_training


def train(tree: dict[str, Any], until: int | None = None) -> bool:
    """The training loop; stopped by a signal in step `until`."""
    return run_training(tree) if until is None else train_until_killed(tree, until)


def train_with_log(tree: dict[str, Any], until: int | None = None) -> tuple[bool, str]:
    """Like `train`; also returns what was logged."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger("dattn_mcore")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    return train(tree, until), stream.getvalue()


def saved_scales(folder: Path) -> list[str]:
    """Keys of the FP8 scales of a checkpoint."""
    return [key for key in read_metadata(folder).state_dict_metadata if key.startswith(FP8)]
