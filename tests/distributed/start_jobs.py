"""What the pool's workers do before the first step: waiting, agreeing, checking the folder."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.distributed as dist


def wait_for_a_slow_rank(folder: str) -> bool:
    """The last rank comes late; returns whether the others waited for it."""
    from dattn_mcore.parallel.groups import wait_for_all

    came = Path(folder) / "came"
    if dist.get_rank() == dist.get_world_size() - 1:
        time.sleep(1)
        came.write_text("")
    wait_for_all("a slow rank")
    return came.exists()


def agree_on(kind: str) -> tuple[str, str]:
    """The last rank has an error of a kind; returns what this rank raises: its type and message."""
    from dattn_mcore import errors
    from dattn_mcore.data.sources.record import RecordError
    from dattn_mcore.training.agreement import agree

    made = {
        "RecordError": RecordError("no id", "7"),
        "ConfigError": errors.ConfigError("first", "second"),
        "UnknownError": type("UnknownError", (errors.DattnError,), {})("new here"),
    }
    mine = None
    if dist.get_rank() == dist.get_world_size() - 1:
        mine = made[kind] if kind in made else getattr(errors, kind)("it is so")
    try:
        agree(mine, torch.device("cpu"))
    except errors.DattnError as error:
        return type(error).__name__, str(error)
    return "", ""


def check_folder(run_dirs: list[str]) -> None:
    """The start-up check of the checkpoint folder; each rank is given its own path."""
    from dattn_mcore.training import start_checks

    start_checks.SHARED_FOLDER_SECONDS = 0.5
    start_checks.check_checkpoint_folder(Path(run_dirs[dist.get_rank()]), torch.device("cpu"))
