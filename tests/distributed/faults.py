"""Ranks as a launcher would start them, one of which goes wrong on purpose."""

from __future__ import annotations

import os
import resource
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
    faulty: int = 1,
) -> list[Any]:
    """Starts `pretrain_dattn.py`'s command on some ranks, one of which has the fault.

    Args:
        tree: configuration.
        folder: where the configuration and each rank's output go (`rank0.log`, ...).
        fault: name of a function in this file, called on the faulty rank before the command.
        overrides: further arguments of a rank.
        world_size: number of ranks.
        faulty: rank that has the fault.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    common = ["--config", str(folder / "run.yaml"), "--device", "cpu"]
    arguments = [
        (
            folder,
            fault if rank == faulty else "nothing",
            [*common, *(overrides or {}).get(rank, [])],
        )
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


def limited_files(folder: Path) -> None:
    """No file may grow beyond the bytes in `limit`: a write fails midway, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = int((folder / "limit").read_text())
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


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


def in_step_two(does: Any) -> None:
    """Calls something at the start of the second step."""
    from dattn_mcore.training import loop

    original, calls = loop.train_step, [0]

    def counted(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            does(*args)
        return original(*args)

    loop.train_step = counted


def killed(folder: Path) -> None:
    """SIGKILL in the second step, as when a machine's memory is full."""
    in_step_two(lambda *_: os.kill(os.getpid(), signal.SIGKILL))


def defect(folder: Path) -> None:
    """An error that nobody foresaw, in the second step."""

    def fails(*_: Any) -> None:
        raise KeyError("nobody foresaw this")

    in_step_two(fails)


def broken_loader(folder: Path) -> None:
    """A decoder comes up with an error of its own while the second step is prepared."""
    from dattn_mcore.data.pipeline import DataPipeline

    original = DataPipeline._build

    def breaks(self: Any, step: int) -> Any:
        if step == 1:
            raise RuntimeError("decoder lost\nits context")
        return original(self, step)

    DataPipeline._build = breaks


def sick_gpu(folder: Path) -> None:
    """The GPU fails while the second step's images are resized on it."""
    from dattn_mcore.data.pipeline import DataPipeline
    from dattn_mcore.errors import RankError

    original = DataPipeline._build

    def fails(self: Any, step: int) -> Any:
        if step == 1:
            raise RankError("the GPU fails while it resizes an image, a.jpg (ECC); take it out")
        return original(self, step)

    DataPipeline._build = fails


def full_memory(folder: Path) -> None:
    """The second pack of the second step asks for more memory than any machine has."""
    import torch

    from dattn_mcore.models.dattn import DattnModel

    original, calls = DattnModel.forward, [-1]

    def greedy(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 1:
            torch.empty(2**50, dtype=torch.uint8)
        return original(self, *args, **kwargs)

    def arms(*_: Any) -> None:
        calls[0] = -1
        DattnModel.forward = greedy

    in_step_two(arms)


def full_memory_of_the_optimizer(folder: Path) -> None:
    """As above, in the update."""
    import torch

    def arms(model: Any, optimizer: Any, *_: Any) -> None:
        optimizer.get_grad_norm = lambda: torch.empty(2**50, dtype=torch.uint8)

    in_step_two(arms)


def full_memory_of_the_loader(folder: Path) -> None:
    """As above, where images are decoded."""
    from dattn_mcore.data.pipeline import DataPipeline

    def breaks(self: Any, step: int) -> Any:
        raise MemoryError

    DataPipeline._build = breaks


def killed_in_validation(folder: Path) -> None:
    """SIGKILL within the second pass over the held-out samples."""
    from dattn_mcore.data.validation import ValidationData

    original, passes = ValidationData.batch, [0]

    def batch(self: ValidationData, number: int) -> Any:
        passes[0] += number == 0
        if passes[0] == 2 and number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, number)

    ValidationData.batch = batch  # type: ignore[method-assign]
