"""Checks what PyTorch and Megatron-Core are going to read of a checkpoint, before they do.

A checkpoint holds tensors and plain values. Its index says which entries are tensors and which are
byte entries, and PyTorch reads the latter with `weights_only=False`, which runs what they name. So
the index must call everything a tensor. Checkpoints of format 1 kept the RNG states in a byte
entry: that one is read here, and never by PyTorch's planner.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import re
from collections.abc import Collection, Iterator
from pathlib import Path, PurePath
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)

from dattn_mcore.checkpoint.metadata import NAME, read_metadata
from dattn_mcore.errors import CheckpointError

COMMON = "common.pt"  # Megatron-Core's: what is no tensor
BACKEND = "metadata.json"  # Megatron-Core's: which of its readers to take
RNG = "rng."  # prefix of the keys of RNG states
FP8 = "fp8."  # prefix of the keys of FP8 scales
EMA = "ema."  # prefix of the model's keys, for the running mean of its weights
SMALL = (NAME, COMMON, BACKEND)  # files beside the shards
_TORCH_DIST = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_OLD_RNG = re.compile(r"rng_pp\d+_tp\d+/shard_\d+\.\d+_\d+\.\d+")
_FORCE, _FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextlib.contextmanager
def only_weights() -> Iterator[None]:
    """Inside, every `torch.load` has `weights_only=True`, whatever it or the environment asks for.

    PyTorch documents the variable that does so.
    """
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def check_content(folder: Path, manifest: dict[str, Any]) -> Metadata:
    """Checks that a checkpoint holds what this trainer writes, and nothing that could run code.

    Args:
        folder: a checkpoint.
        manifest: its own, from `read_manifest`.

    Returns:
        Its index.

    Raises:
        CheckpointError: says what is wrong, in one line.
    """
    files = manifest["files"]
    for name in SMALL:
        if name not in files:
            raise CheckpointError(f"{folder}: the manifest lacks {name}; use another checkpoint")
    _check_backend(folder / BACKEND)
    index = read_metadata(folder)
    _check_places(folder, index, files)
    for key, stored in index.state_dict_metadata.items():
        if type(stored) is BytesStorageMetadata and _OLD_RNG.fullmatch(key):
            read_object(folder, index, key)
        elif type(stored) is not TensorStorageMetadata:
            raise CheckpointError(
                f"{folder / NAME} says that {key} is no tensor, but bytes that could run code; "
                "take a checkpoint from a place you trust"
            )
    # Converted weights have no step of their own in there.
    there = read_common(folder).get("step")
    here = None if manifest.get("data_fingerprint") is None else manifest["step"]
    if type(there) is not type(here) or there != here:
        raise CheckpointError(
            f"{folder / COMMON} is of step {there}, and the manifest of step {here}; use another "
            "checkpoint"
        )
    return index


def write_backend(folder: Path) -> None:
    """Writes the file by which Megatron-Core chooses its reader; 0.19 would leave fields out."""
    (folder / BACKEND).write_text(json.dumps(_TORCH_DIST), encoding="utf-8")


def check_inside(name: str, index: Path) -> None:
    """Refuses the name of a file outside the checkpoint's folder.

    Args:
        name: of a file.
        index: the file that names it.

    Raises:
        CheckpointError: it leads outside.
    """
    path = PurePath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
        raise CheckpointError(
            f"{index} names {name!r}; an index may only name files of its own folder"
        )


def read_common(folder: Path) -> dict[str, Any]:
    """Reads what is no tensor: the step, and settings of the optimizer.

    Raises:
        CheckpointError: it is missing or damaged, or holds more than plain values.
    """
    path = folder / COMMON
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None
    common = _plain(content, str(path))
    if not isinstance(common, dict):
        raise CheckpointError(f"{path} is damaged; use another checkpoint")
    return common


def read_object(folder: Path, index: Metadata, key: str) -> Any:
    """Reads a byte entry of a checkpoint of format 1.

    Args:
        folder: the checkpoint.
        index: accepted by `check_content`.
        key: of the entry.

    Raises:
        CheckpointError: it is missing or damaged, or holds more than tensors and plain values.
    """
    places = [place for entry, place in index.storage_data.items() if entry.fqn == key]
    if len(places) != 1:
        raise CheckpointError(f"{folder / NAME} has no single place for {key}")
    path = folder / places[0].relative_path
    try:
        with path.open("rb") as file:
            file.seek(places[0].offset)
            content = file.read(places[0].length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None
    return _plain(content, f"{path}: {key}")


def _plain(content: bytes, name: str) -> Any:
    """Tensors and plain values out of what `torch.save` wrote."""
    try:
        with only_weights():
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{name} holds what is neither tensor nor plain value and could run code, or is "
            "damaged; take a checkpoint from a place you trust"
        ) from None
    except Exception as error:  # noqa: BLE001 (a damaged file can raise anything)
        raise CheckpointError(
            f"{name} cannot be read ({type(error).__name__}); the checkpoint is damaged, use "
            "another one"
        ) from None


def _check_backend(path: Path) -> None:
    try:
        named = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        named = None
    if named != _TORCH_DIST:
        raise CheckpointError(
            f"{path} names another format than Megatron-Core's torch_dist, version 1; use another "
            "checkpoint"
        )


def _check_places(folder: Path, index: Metadata, files: Collection[str]) -> None:
    """Every entry lies in a file of the folder whose hash is known, and is read as it is."""
    for place in index.storage_data.values():
        name, numbers = place.relative_path, (place.offset, place.length)
        if type(name) is not str or any(type(n) is not int or n < 0 for n in numbers):
            raise CheckpointError(f"{folder / NAME} is damaged; use another checkpoint")
        check_inside(name, folder / NAME)
        if name not in files:
            raise CheckpointError(
                f"{folder / NAME} names {name}, which dattn.json does not; use another checkpoint"
            )
        if getattr(place, "transform_descriptors", None):
            raise CheckpointError(
                f"{folder / NAME}: {name} went through a transformation that this trainer does "
                "not use; use another checkpoint"
            )
