"""Ranks as a launcher would start them, one of which goes wrong on purpose."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import yaml

from tests import ranks


def start_ranks(
    tree: dict[str, Any],
    folder: Path,
    fault: str,
    overrides: dict[int, list[str]] | None = None,
    world_size: int = 2,
) -> list[Any]:
    """Starts `pretrain_dattn.py`'s command on some ranks; rank 1 has the fault.

    Args:
        tree: configuration.
        folder: where the configuration and each rank's output go (`rank0.log`, ...).
        fault: name of a function in this file, called on rank 1 before the command.
        overrides: further arguments of a rank.
        world_size: number of ranks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    common = ["--config", str(folder / "run.yaml"), "--device", "cpu"]
    arguments = [
        (folder, fault if rank == 1 else "nothing", [*common, *(overrides or {}).get(rank, [])])
        for rank in range(world_size)
    ]
    return ranks.start_ranks(_train, arguments, folder)


def _train(folder: Path, fault: str, arguments: list[str]) -> int:
    from dattn_mcore.training import main

    main.SPEAKER_SECONDS = 0.0
    globals()[fault](folder)
    return main.main(arguments)


def nothing(folder: Path) -> None:
    """No fault."""


def stopped(folder: Path) -> None:
    """SIGSTOP in the second step, as when a node hangs."""
    from dattn_mcore.training import loop

    original, calls = loop.train_step, [0]

    def stops(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            (folder / "fault").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGSTOP)
        return original(*args)

    loop.train_step = stops


def dead_loader(folder: Path) -> None:
    """The thread that prepares data never finishes the second step's."""
    from dattn_mcore.data.pipeline import DataPipeline

    original = DataPipeline._build

    def hangs(self: Any, step: int) -> Any:
        if step == 1:
            (folder / "fault").write_text(str(time.time()))
            threading.Event().wait()
        return original(self, step)

    DataPipeline._build = hangs
