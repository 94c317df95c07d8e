"""Writes Megatron-Core's `torch_dist` format tensor by tensor, from one process or several.

The format is PyTorch's distributed checkpoint with two small files of Megatron-Core beside it: one
file a process, tensors saved one behind another, and `.metadata`, which says what lies where.
Tensors are made when they are written and forgotten afterwards. Files are hashed as they are
written.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.serialization import get_crc32_options, set_crc32_options

from dattn_mcore.architectures.parameters import Shape
from dattn_mcore.checkpoint.content import COMMON, write_backend
from tools.checkpoint_convert.workers import Progress, Report, in_shares, run_shares


@dataclass(frozen=True)
class Planned:
    """A tensor that will be made when its turn comes.

    Attributes:
        key: Megatron-Core key.
        layer: which layer of a stacked tensor; None for a key without layers.
        layers: how many layers the key stacks.
        shape: without the layer axis.
        dtype: of the tensor.
        make: makes it; called once, in another thread, perhaps of another process.
    """

    key: str
    layer: int | None
    layers: int | None
    shape: Shape
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """Which part of the whole tensor it is."""
        if self.layer is None:
            return ChunkStorageMetadata(torch.Size([0] * len(self.shape)), torch.Size(self.shape))
        offsets = (self.layer, *(0 for _ in self.shape))
        return ChunkStorageMetadata(torch.Size(offsets), torch.Size((1, *self.shape)))


def write_tensors(
    path: Path,
    tensors: list[Planned],
    progress: Progress = lambda done, total: None,
    processes: int = 1,
) -> dict[str, list[Any]]:
    """Writes tensors as a checkpoint that `megatron.core.dist_checkpointing.load` reads.

    In each process, while one tensor is written and hashed, the next one is made: two are in
    memory at a time.

    Args:
        path: an empty folder.
        tensors: what to write, in this order.
        progress: called after every tensor.
        processes: how many share the work; each writes one file.

    Returns:
        Size and SHA-256 of every file of tensors, by name.

    Raises:
        CheckpointError: a tensor could not be made.
        OSError: a file could not be written.
    """
    shares = in_shares(tensors, processes, lambda tensor: tensor.nbytes)
    total = sum(tensor.nbytes for tensor in tensors)
    files = [f"__{share}_0.distcp" for share in range(len(shares))]

    def write(share: int, report: Report) -> tuple[list[WriteResult], list[Any]]:
        return _write_file(path / files[share], shares[share], report)

    with _no_second_checksum():
        written = run_shares(write, len(shares), total, progress)
    index = FileSystemWriter(path)
    index.finish(_describe(tensors), [results for results, _ in written])
    torch.save({}, path / COMMON)
    write_backend(path)
    return {file: digest for file, (_, digest) in zip(files, written, strict=True)}


def _describe(tensors: list[Planned]) -> Metadata:
    """Shape, dtype and chunks of every key."""
    described: dict[str, Any] = {}
    for tensor in tensors:
        if tensor.key not in described:
            stacked = () if tensor.layers is None else (tensor.layers,)
            described[tensor.key] = TensorStorageMetadata(
                properties=TensorProperties(dtype=tensor.dtype),
                size=torch.Size((*stacked, *tensor.shape)),
                chunks=[],
            )
        described[tensor.key].chunks.append(tensor.chunk)
    return Metadata(described)


def _write_file(
    path: Path, tensors: list[Planned], report: Report
) -> tuple[list[WriteResult], list[Any]]:
    """Writes one file; returns where each tensor lies in it, and its size and SHA-256."""
    results = []
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(2) as threads:
        stream = _HashingStream(file, threads)
        following = threads.submit(tensors[0].make)
        for number, planned in enumerate(tensors, start=1):
            tensor = following.result()
            assert tuple(tensor.shape) == planned.shape, planned.key
            assert tensor.dtype == planned.dtype, planned.key
            if number < len(tensors):
                following = threads.submit(tensors[number].make)
            offset = stream.size
            stream.save(_alone(tensor if planned.layer is None else tensor[None]))
            index = MetadataIndex(planned.key, planned.chunk.offsets)
            place = _StorageInfo(path.name, offset, stream.size - offset)
            results.append(WriteResult(index, place.length, place))
            report(planned.nbytes)
        os.fsync(file.fileno())
    return results, [stream.size, stream.sha256.hexdigest()]


def _alone(tensor: Tensor) -> Tensor:
    """The tensor without the rest of what it is a view of, which `torch.save` would write too."""
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes and tensor.is_contiguous()
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


class _HashingStream:
    """A file that is only ever appended to; hashing runs beside the writing."""

    def __init__(self, file: BinaryIO, threads: ThreadPoolExecutor) -> None:
        self._file, self._threads = file, threads
        self.sha256, self.size = hashlib.sha256(), 0
        self._failure: OSError | None = None

    def save(self, tensor: Tensor) -> None:
        """Appends a tensor as `torch.save` writes it."""
        try:
            torch.save(tensor, cast(IO[bytes], self))
        except RuntimeError as error:  # how PyTorch wraps what `write` raised
            raise self._failure or error from None

    def write(self, data: Any) -> int:
        """Appends bytes; for `torch.save`."""
        hashed = self._threads.submit(self.sha256.update, data)
        rest = memoryview(data)
        try:
            while len(rest):  # one call writes 2 GiB at most
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._failure = error
            raise
        finally:
            hashed.result()  # the bytes are the caller's again
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """Nothing waits in memory; `torch.save` asks for it."""


@contextmanager
def _no_second_checksum() -> Iterator[None]:
    """Without the CRC-32 that `torch.save` computes and `torch.load` ignores: SHA-256 covers it."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)
