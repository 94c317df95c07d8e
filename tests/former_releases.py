"""What earlier releases made, as `tests/fixtures/releases` keeps it."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import Any

from dattn_mcore.config.load import load_config, merge, to_dict

FOLDER = Path(__file__).parent / "fixtures/releases"
NAMES = ("before_architectures", "with_architectures")
CHECKPOINT = "runs/small/checkpoints/step_00000002"


def unpack(name: str, folder: Path) -> Path:
    """Writes the files of a release, with the times that its index knows, and returns their folder."""
    target = folder / name
    with tarfile.open(FOLDER / f"{name}.tar.xz") as archive:
        # Python's own releases since 2023 have filters, and later ones ask for one.
        if hasattr(tarfile, "data_filter"):
            archive.extractall(target, filter="data")
        else:
            archive.extractall(target)
    return target


def expected_of(folder: Path) -> dict[str, Any]:
    """What its own code said: `steps` 3 and 4 of the run, and `logits` of the export."""
    found: dict[str, Any] = json.loads((folder / "expected.json").read_text())
    return found


def train_in(folder: str, settings: dict[str, Any]) -> bool:
    """Runs in a worker of the pool: goes on with the run of a release, in its folder.

    The paths in its YAML are relative, and its index is known by them.
    """
    from tests.distributed.jobs import run_training

    before = Path.cwd()
    os.chdir(folder)
    try:
        return run_training(merge(to_dict(load_config("run.yaml")), settings))
    finally:
        os.chdir(before)
