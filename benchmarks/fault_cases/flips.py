"""Damage to the files of a checkpoint: single bits, cuts, losses. The older whole one is taken."""

from __future__ import annotations

import functools
import logging
import os
import random
import shutil
from pathlib import Path

from benchmarks.fault_cases.case import STEPS, Case, Workshop

FLIPS_A_FILE = 60
NEWEST, OLDER = f"step_{STEPS:08d}", f"step_{STEPS - 1:08d}"


def cases(generator: random.Random, files: dict[str, int]) -> list[Case]:
    """Bits of every file, and every file cut, emptied, grown, gone.

    Args:
        generator: chooses bits.
        files: names and sizes of the newest checkpoint's.
    """
    found = []
    for name, size in files.items():
        for _ in range(FLIPS_A_FILE):
            bit = generator.randrange(size * 8)
            run = functools.partial(_damaged, name=name, bit=bit)
            found.append(Case(kind="flip", name=f"{name}, bit {bit}", run=run))
        for what in ("cut", "empty", "grown", "gone"):
            run = functools.partial(_damaged, name=name, what=what)
            found.append(Case(kind="file", name=f"{name} {what}", run=run))
    return found


def _damaged(
    folder: Path, workshop: Workshop, name: str, bit: int | None = None, what: str = ""
) -> str | None:
    """Trainer and tools must both notice it; a start goes on from the older checkpoint."""
    from dattn_mcore.checkpoint.load import choose_checkpoint
    from dattn_mcore.errors import CheckpointError
    from dattn_mcore.parallel.groups import single_process
    from tools.checkpoint_convert.inspect_path import inspect

    for checkpoint in (NEWEST, OLDER):
        # Linked where nothing is changed: a copy of megabytes for a bit would take the time.
        shutil.copytree(
            workshop.whole / "checkpoints" / checkpoint,
            folder / "checkpoints" / checkpoint,
            copy_function=os.link,
        )
    file = folder / "checkpoints" / NEWEST / name
    raw = bytearray(file.read_bytes())
    file.unlink()
    if bit is not None:
        raw[bit // 8] ^= 1 << bit % 8
    if what != "gone":
        file.write_bytes({"cut": raw[:-1], "empty": b"", "grown": raw + b"\0"}.get(what, raw))
    warnings = _Warnings()
    logging.getLogger("dattn_mcore").addHandler(warnings)
    try:
        with single_process():  # choosing a checkpoint is a decision of all ranks
            chosen = choose_checkpoint(folder)
    finally:
        logging.getLogger("dattn_mcore").removeHandler(warnings)
    if chosen is None or chosen[0].name != OLDER:
        return f"not noticed: the run would go on from {chosen and chosen[0].name}"
    if not any(NEWEST in line for line in warnings.lines):
        return "noticed, and not said"
    try:
        inspect(file.parent)
    except CheckpointError as error:
        return "a message of several lines" if "\n" in str(error) else None
    # `inspect` reads what it shows only; a conversion verifies all.
    return _conversion_notices(file.parent, folder)


def _conversion_notices(checkpoint: Path, folder: Path) -> str | None:
    from dattn_mcore.errors import CheckpointError
    from tools.checkpoint_convert.mcore_to_hf import convert

    try:
        convert(checkpoint, folder / "export")
    except CheckpointError as error:
        return "a message of several lines" if "\n" in str(error) else None
    return "not noticed: mcore-to-hf exports it"


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
