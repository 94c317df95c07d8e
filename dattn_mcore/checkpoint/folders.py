"""Which checkpoints exist, which of them are whole, and what a run folder holds.

A checkpoint is written as `step_00000200.tmp` and renamed when every file is on disk. Its last
file, `dattn.json`, carries the step, the resolved configuration and size and SHA-256 of all other
files, so that a truncated, missing or altered file is found before anything is loaded.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from dattn_mcore.config.schema import Config
from dattn_mcore.errors import CheckpointError

MANIFEST = "dattn.json"
FORMAT = 1


def checkpoint_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of a step lives."""
    return root / f"step_{step:08d}"


def list_checkpoints(root: Path) -> list[Path]:
    """Finished checkpoint folders, newest first. Unfinished ones (`.tmp`) are not listed."""
    return sorted(
        (path for path in root.glob("step_*") if path.suffix != ".tmp" and path.is_dir()),
        key=lambda path: path.name,
        reverse=True,
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads `dattn.json` of a checkpoint.

    Raises:
        CheckpointError: it is missing or no JSON.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        int(manifest["step"]), dict(manifest["config"])
        for size, sha256 in manifest["files"].values():
            int(size), str(sha256)
    except OSError:
        raise CheckpointError(
            f"{folder} is no checkpoint (no {MANIFEST}); name a folder step_... of a run"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path} is damaged; use another checkpoint") from None
    return manifest


def describe_tokenizer(config: Config, fingerprint: str | None = None) -> dict[str, Any]:
    """What a manifest says about the tokenizer, so that an export finds the same.

    Args:
        config: its `data.tokenizer` may be relative to the folder that the run was started in.
        fingerprint: of the tokenizer; None: it was not opened.
    """
    return {"path": str(Path(config.data.tokenizer).absolute()), "fingerprint": fingerprint}


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            sha256.update(block)
    return sha256.hexdigest()


def data_files(folder: Path) -> list[str]:
    """All files of a checkpoint but the manifest, by name."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST
    )


def damage(folder: Path, names: list[str], files: dict[str, list[Any]]) -> str | None:
    """The first of the named files that is not as the manifest says; None if all are."""
    for name in names:
        size, sha256 = files[name]
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if digest(path) != sha256:
            return f"{name} was altered (SHA-256 differs)"
    return None


def remove_old(root: Path, keep: int) -> None:
    """Deletes all but the newest whole checkpoints, and what interrupted saves left behind."""
    for path in list_checkpoints(root)[keep:]:
        shutil.rmtree(path)
    for path in root.glob("step_*.tmp"):
        shutil.rmtree(path)


def find_checkpoints(path: Path) -> list[Path]:
    """Candidates behind what a user named: a checkpoint, its parent, or a run folder.

    Raises:
        CheckpointError: there is none.
    """
    if (path / MANIFEST).is_file() or path.name.startswith("step_"):
        return [path]
    for root in (path, path / "checkpoints"):
        found = list_checkpoints(root)
        if found:
            return found
    raise CheckpointError(
        f"{path} holds no finished checkpoint; name a run folder or a folder step_... in it"
    )
