"""Which checkpoints exist, which of them are whole, and which of them may go.

A checkpoint is written as `step_00000200.tmp` and renamed when every file is on disk, its manifest
last. What has another name, or no manifest that is right, is not a run's own: it is neither read
unasked nor counted nor deleted.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from dattn_mcore.checkpoint.manifest import MANIFEST, is_of_a_run, read_manifest, step_of
from dattn_mcore.checkpoint.retention import Retention
from dattn_mcore.errors import CheckpointError

SCORES = "scores"  # folder of what a run's checkpoints scored, with a file of that name for each
EXPORTS = "exports"  # folder of a run's Hugging Face folders, beside that of its checkpoints
_ASIDE = ".old.tmp"  # of a checkpoint that is being deleted or replaced


def list_checkpoints(root: Path) -> list[Path]:
    """Finished checkpoint folders, newest first; nothing but what a run names so."""
    found = [path for path in root.glob("step_*") if step_of(path) is not None and path.is_dir()]
    return sorted(found, key=lambda path: step_of(path) or 0, reverse=True)


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


def damage(
    folder: Path, names: list[str], files: dict[str, list[Any]], hashes: bool = True
) -> str | None:
    """The first of the named files that is not as the manifest says; None if all are.

    Args:
        folder: the checkpoint.
        names: which files to look at.
        files: size and SHA-256 of each, from the manifest.
        hashes: read them; without, only their sizes are compared.
    """
    for name in names:
        size, sha256 = files[name]
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if hashes and digest(path) != sha256:
            return f"{name} was altered (SHA-256 differs)"
    return None


def find_checkpoints(path: Path) -> list[Path]:
    """Candidates behind what a user named: a checkpoint, its parent, or a run folder.

    Raises:
        CheckpointError: there is none.
    """
    if (path / MANIFEST).is_file() or step_of(path) is not None:
        return [path]
    for root in (path, path / "checkpoints"):
        found = list_checkpoints(root)
        if found:
            return found
    raise CheckpointError(
        f"{path} holds no finished checkpoint; name a run folder or a folder step_... in it"
    )


def is_whole(folder: Path) -> bool:
    """Whether a run saved the checkpoint and it is whole; see `whole_manifest`."""
    return whole_manifest(folder) is not None


def whole_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a whole checkpoint that a run saved; None of any other folder.

    It is whole if its manifest is right and its files have their sizes. Their content is not read:
    that takes as long as a load, and is done before one.
    """
    try:
        manifest = read_manifest(folder)
        files = manifest["files"]
        whole = is_of_a_run(manifest) and damage(folder, sorted(files), files, hashes=False) is None
    except (CheckpointError, OSError):
        return None
    return manifest if whole else None


def export_of(checkpoint: Path) -> Path:
    """Where the Hugging Face folder of a run's checkpoint lives."""
    return checkpoint.parent.parent / EXPORTS / checkpoint.name


def _metrics(manifest: dict[str, Any]) -> dict[str, float]:
    """Without scores, which older manifests have of an earlier checkpoint."""
    metrics = manifest.get("metrics", {})
    return {name: metrics[name] for name in metrics if not name.startswith(f"{SCORES}/")}


def scored(checkpoint: Path) -> dict[str, float]:
    """What a run's checkpoint scored (`scores/NAME`); none where it was not scored, or not yet."""
    path = checkpoint.parent.parent / SCORES / checkpoint.name / f"{SCORES}.json"
    try:
        values = json.loads(path.read_text("utf-8"))["values"]
        return {
            f"{SCORES}/{name}": float(value) for name, value in values.items() if value is not None
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def delete_export(checkpoint: Path) -> None:
    """Deletes the Hugging Face folder of a run's checkpoint, where there is one of its own."""
    export = export_of(checkpoint)
    if export.is_dir() and not export.is_symlink():
        delete(export)


def remove_old(root: Path, rules: Retention, saved: Path, in_use: Collection[Path] = ()) -> None:
    """Deletes older whole checkpoints, and what interrupted saves and deletions left behind.

    Newer ones than `saved` are there only because they could not be read, or were not asked for.
    The export of a checkpoint goes with it, and before it: killed in between, the next save
    deletes the checkpoint.

    Args:
        root: folder of checkpoints.
        rules: say which whole ones stay.
        saved: the checkpoint that was written just now; it stays in any case.
        in_use: others that somebody still reads; a later save deletes them.
    """
    newest = step_of(saved) or 0
    older = [path for path in list_checkpoints(root) if (step_of(path) or 0) <= newest]
    manifests = {path: whole_manifest(path) for path in older if not path.is_symlink()}
    whole = {path: fields for path, fields in manifests.items() if fields is not None}
    known = {f["step"]: _metrics(f) | scored(path) for path, f in whole.items()}
    stay = rules.staying(known)
    for path in whole:
        if path != saved and path not in in_use and step_of(path) not in stay:
            delete_export(path)
            delete(path)
    for path in (*root.glob("step_*.tmp"), *(root.parent / EXPORTS).glob("step_*.tmp")):
        if _is_unfinished(path):
            delete(path)


def delete(folder: Path) -> None:
    """Deletes a checkpoint; an interrupted deletion leaves none that looks finished."""
    if not _is_unfinished(folder):
        folder = set_aside(folder)
    shutil.rmtree(folder)


def set_aside(folder: Path) -> Path:
    """Gives a checkpoint a name that the next save clears away; returns its new place."""
    aside = folder.with_name(f"{folder.name}{_ASIDE}")
    if aside.exists():
        shutil.rmtree(aside)
    os.replace(folder, aside)
    return aside


def put(temporary: Path, final: Path) -> Path | None:
    """Gives a whole checkpoint its name.

    Args:
        temporary: where it is.
        final: where it goes; what is there makes place only if it can.

    Returns:
        Where that is now, to be deleted; None if nothing was there.
    """
    replaced = set_aside(final) if final.exists() else None
    try:
        os.replace(temporary, final)
    except OSError:
        if replaced is not None:
            os.replace(replaced, final)
        raise
    return replaced


def _is_unfinished(path: Path) -> bool:
    name = path.name.removesuffix(_ASIDE) if path.name.endswith(_ASIDE) else path.stem
    own = path.suffix == ".tmp" and step_of(path.with_name(name)) is not None
    return own and path.is_dir() and not path.is_symlink()
