"""Megatron-Core's distributed checkpoints (`torch_dist`), read and written by key.

Reading goes through the file index that torch.distributed.checkpoint writes, slice by slice, so
one layer of a stacked tensor costs one layer of memory. Writing is in `streaming`.
"""

from __future__ import annotations

import io
import logging
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import TensorStorageMetadata
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from dattn_mcore.architectures.parameters import Shape
from dattn_mcore.checkpoint import manifest
from dattn_mcore.checkpoint.content import EMA, FP8, RNG, SMALL, check_content
from dattn_mcore.checkpoint.folders import damage, data_files, digest, find_checkpoints
from dattn_mcore.checkpoint.manifest import (
    MANIFEST,
    describe_tokenizer,
    new_manifest,
    read_manifest,
)
from dattn_mcore.config.checks import check_config
from dattn_mcore.config.saved import saved_config
from dattn_mcore.config.schema import Config
from dattn_mcore.errors import CheckpointError, ConfigError
from tools.checkpoint_convert.safetensors_folder import PICKLES
from tools.checkpoint_convert.streaming import Planned, write_tensors
from tools.checkpoint_convert.workers import Progress

logger = logging.getLogger(__name__)
NOT_THE_MODEL = (
    "optimizer.",
    "chained_",
    RNG,
    EMA,
    FP8,
)  # key prefixes of what a conversion leaves behind


class DistCheckpoint:
    """A checkpoint on disk.

    Attributes:
        path: its folder.
        config: the configuration it was written with.
        step: optimizer step.
        tokenizer: `path` and `fingerprint` of the run's; empty in a checkpoint of before.
        shapes: shape of every tensor of the model, the layer axis included.
        dtypes: dtype of the same.
        ignored: keys that belong to the optimizer, to the running mean, or are no tensors.
        ema: whether weights are those of the running mean, where there is one of them: parameters
            that were frozen are their own mean.
        of_base: `path` and `fingerprint` of the base of adapters; None: it holds a whole model.
    """

    def __init__(self, path: str | Path, ema: bool = False) -> None:
        """Opens a checkpoint or a run folder.

        Args:
            path: its folder.
            ema: read the running mean of the weights in their place.

        Raises:
            CheckpointError: it is missing or unreadable, or holds no running mean.
        """
        self.ema = ema
        self.path, fields, self._metadata = _open(Path(path))
        self.step = int(fields["step"])
        self.tokenizer: dict[str, Any] = fields.get("tokenizer", {})
        self._files: dict[str, Any] = fields["files"]
        self.of_base: dict[str, str] | None = fields.get("base")
        try:
            self.config: Config = saved_config(fields["config"])
            check_config(self.config)
        except ConfigError as error:
            raise CheckpointError(f"{self.path / MANIFEST}: {error}") from None
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.ignored: list[str] = []
        for key, stored in self._metadata.state_dict_metadata.items():
            if not isinstance(stored, TensorStorageMetadata) or key.startswith(NOT_THE_MODEL):
                self.ignored.append(key)
                continue
            self.shapes[key] = tuple(stored.size)
            self.dtypes[key] = stored.properties.dtype
        if ema and not any(self._stored_key(key) != key for key in self.shapes):
            raise CheckpointError(
                f"{self.path} holds no running mean of the weights (train.ema_decay was not set); "
                "leave --ema out"
            )

    @property
    def digests(self) -> dict[str, tuple[int, str]]:
        """Size and SHA-256 of every file, as the manifest promises."""
        return {name: (size, sha256) for name, (size, sha256) in self._files.items()}

    def place(self, key: str, layer: int | None = None) -> tuple[str, int]:
        """File and offset where a tensor, or one layer of it, begins."""
        key = self._stored_key(key)
        stored: Any = self._metadata.state_dict_metadata[key]
        for chunk in stored.chunks:
            first, count = (chunk.offsets[0], chunk.sizes[0]) if chunk.sizes else (0, 1)
            if layer is None or first <= layer < first + count:
                where = self._metadata.storage_data.get(MetadataIndex(key, chunk.offsets))
                if where is not None:
                    return str(where.relative_path), int(where.offset)
        return "", 0  # read() says what is missing

    def read(self, key: str, layer: int | None = None) -> Tensor:
        """Reads a tensor, or one layer of a stacked tensor, in the dtype of the weights.

        Raises:
            CheckpointError: its file is missing or damaged, or does not hold all of it.
        """
        return self.read_exact(key, layer).to(self.dtypes[key])

    def read_exact(self, key: str, layer: int | None = None) -> Tensor:
        """Reads a tensor, or one layer of it, as it is stored: a running mean in float32.

        Raises:
            CheckpointError: as `read`.
        """
        place = self._stored_key(key)
        stored: Any = self._metadata.state_dict_metadata[place]
        first, shape = (
            (0, self.shapes[key]) if layer is None else (layer, (1, *self.shapes[key][1:]))
        )
        for chunk in stored.chunks:  # the usual case: nothing to put together
            if list(chunk.sizes) == list(shape) and (layer is None or chunk.offsets[0] == layer):
                part = self._read_chunk(place, chunk.offsets, list(shape))
                return part if layer is None else part[0]
        result = torch.empty(shape, dtype=stored.properties.dtype)
        filled = 0
        for chunk in stored.chunks:
            offsets, sizes = list(chunk.offsets), list(chunk.sizes)
            if layer is not None and not offsets[0] <= layer < offsets[0] + sizes[0]:
                continue
            part = self._read_chunk(place, chunk.offsets, sizes)
            if layer is not None:
                part = part[layer - offsets[0]][None]
                offsets[0], sizes[0] = layer, 1
            offsets[:1] = [offsets[0] - first] if offsets else []
            target = result[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
            target.copy_(part)
            filled += part.numel()
        if filled != result.numel():
            raise CheckpointError(f"{self.path}: {key} is stored in part only; it is damaged")
        return result if layer is None else result[0]

    def _stored_key(self, key: str) -> str:
        """The key of the running mean of a weight, where that is asked for and there."""
        mean = f"{EMA}{key}"
        return mean if self.ema and mean in self._metadata.state_dict_metadata else key

    def _read_chunk(self, key: str, offsets: torch.Size, sizes: list[int]) -> Tensor:
        stored: Any = self._metadata.state_dict_metadata[key]
        place = self._metadata.storage_data.get(MetadataIndex(key, offsets))
        if place is None:
            raise CheckpointError(f"{self.path}: {key} has no place in a file; it is damaged")
        file = self.path / place.relative_path
        try:
            with file.open("rb", buffering=0) as stream:
                section: Any = _Section(stream, place.offset, place.length)
                part = torch.load(section, map_location="cpu", weights_only=True)
            if not isinstance(part, Tensor) or part.dtype != stored.properties.dtype:
                raise ValueError
            return part.reshape(sizes)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{file} cannot be read at {key} ({type(error).__name__}); the checkpoint is "
                "damaged, use an earlier one"
            ) from None


def _open(path: Path) -> tuple[Path, dict[str, Any], Metadata]:
    """The newest checkpoint behind a path that is not damaged, its manifest and its index.

    Shards are compared by size; whoever reads them checks their hashes.

    Raises:
        CheckpointError: there is none.
    """
    candidates = _find(path)
    damaged = False
    for folder in candidates:
        try:
            fields = read_manifest(folder)
            names = sorted(fields["files"])
            problem = damage(folder, names, fields["files"], hashes=False)
            problem = problem or damage(folder, list(SMALL), fields["files"])
            if problem:
                raise CheckpointError(f"{folder}: {problem}; use an earlier checkpoint")
            index = check_content(folder, fields)
        except (CheckpointError, OSError) as error:
            if len(candidates) == 1:
                raise CheckpointError(str(error)) from None
            logger.warning("warning: checkpoint %s cannot be read: %s", folder, error)
            damaged = True
            continue
        if damaged:
            logger.warning("warning: checkpoint %s is taken instead", folder)
        return folder, fields, index
    raise CheckpointError(f"no checkpoint in {path} is readable (see the warnings above)")


def _find(path: Path) -> list[Path]:
    """The checkpoints behind a path, newest first; what else was given is named in the error."""
    try:
        return find_checkpoints(path)
    except CheckpointError:
        if not path.exists():
            raise CheckpointError(f"{path} does not exist") from None
        if (path / "config.json").is_file():
            raise CheckpointError(
                f"{path} is a Hugging Face folder; name a run folder or a folder step_... in it"
            ) from None
        if path.is_file():
            what = (
                "pickled weights, and a pickle can run code" if path.suffix in PICKLES else "a file"
            )
            raise CheckpointError(
                f"{path} is {what}; name a checkpoint folder of this trainer, or for hf-to-mcore a "
                "Hugging Face folder with safetensors"
            ) from None
        found = (file for end in PICKLES for file in path.rglob(f"*{end}"))
        pickles = sorted(file for file in found if file.name != "common.pt")  # an unfinished save
        if pickles:
            raise CheckpointError(
                f"{path} holds pickled weights ({pickles[0].relative_to(path)}); only checkpoints "
                "of this trainer are read, because a pickle can run code"
            ) from None
        raise


class _Section(io.RawIOBase):
    """Part of a file as a file, so that a tensor is read straight into its memory."""

    def __init__(self, stream: io.RawIOBase, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = stream.fileno(), start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = (
            offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        )
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(self._length - self._at, 0)]
        done = 0
        while done < len(view):  # one call reads 2 GiB at most
            count = os.preadv(self._file, [view[done:]], self._start + self._at)
            if count == 0:
                break
            done, self._at = done + count, self._at + count
        return done


def write_checkpoint(
    path: Path,
    tensors: list[Planned],
    config: Config,
    progress: Progress = lambda done, total: None,
    processes: int = 1,
    tokenizer: dict[str, Any] | None = None,
) -> None:
    """Writes a checkpoint that a run can start from (`checkpoint.init_from`).

    Args:
        path: folder to write into; the caller renames it when whole.
        tensors: what to write; each is made when its turn comes.
        config: written beside them.
        progress: called after every tensor.
        processes: how many share the work.
        tokenizer: what a manifest says of it; None: `data.tokenizer` of the configuration.
    """
    path.mkdir(parents=True, exist_ok=True)
    known = write_tensors(path, tensors, progress, processes)
    write_manifest(path, config, known, tokenizer)


def write_manifest(
    path: Path,
    config: Config,
    known: Mapping[str, list[Any]] | None = None,
    tokenizer: dict[str, Any] | None = None,
) -> None:
    """Writes `dattn.json`, with which converted weights are whole: configuration, all files."""
    known = known or {}
    files = {
        name: known.get(name) or [(path / name).stat().st_size, digest(path / name)]
        for name in data_files(path)
    }
    fields = new_manifest(config, step=0, tokenizer=tokenizer or describe_tokenizer(config))
    manifest.write_manifest(path, fields, files)
