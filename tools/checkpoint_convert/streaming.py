"""Writes Megatron-Core's `torch_dist` format tensor by tensor.

The format is PyTorch's distributed checkpoint with two small files of Megatron-Core beside it, so
PyTorch's own writer does the work; a planner hands it tensors that are made when they are written
and forgotten afterwards. Files are hashed as they are written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from dattn_mcore.errors import CheckpointError
from tools.checkpoint_convert.mapping import Shape

Progress = Callable[[int, int], None]  # bytes done, bytes in all


@dataclass(frozen=True)
class Planned:
    """A tensor that will be made when its turn comes.

    Attributes:
        key: Megatron-Core key.
        layer: which layer of a stacked tensor; None for a key without layers.
        layers: how many layers the key stacks.
        shape: without the layer axis.
        dtype: of the tensor.
        make: makes it; called once, in another thread.
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


def write_tensors(
    path: Path,
    tensors: list[Planned],
    progress: Progress = lambda done, total: None,
) -> dict[str, list[Any]]:
    """Writes tensors as a checkpoint that `megatron.core.dist_checkpointing.load` reads.

    While one tensor is written and hashed, the next one is made: two are in memory at a time.

    Args:
        path: an empty folder.
        tensors: what to write, in this order.
        progress: called after every tensor.

    Returns:
        Size and SHA-256 of every file of tensors, by name.

    Raises:
        CheckpointError: a tensor could not be made or written.
    """
    from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
    from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME

    # More than one thread of this writer would lose errors: they end the thread, and the
    # checkpoint is finished without its tensors.
    # Copying ahead is for tensors on a GPU, and changes the order.
    writer = FileSystemWriter(path, thread_count=1, per_thread_copy_ahead=0)
    files = writer.fs = _HashingFiles()
    with ThreadPoolExecutor(1) as maker:
        planner = _LazyPlanner(tensors, progress, maker)
        try:
            dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
        except CheckpointException as wrapper:
            error = next(iter(wrapper.failures.values()))[0]
            if isinstance(error, OSError | RuntimeError):
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise CheckpointError(
                    f"{path} cannot be written ({reason}); free space or choose another place"
                ) from None
            raise error from None
    torch.save({}, path / COMMON_STATE_FNAME)
    save_config(CheckpointingConfig("torch_dist", 1), str(path))
    return files.digests


class _LazyPlanner(DefaultSavePlanner):
    """Plans from shapes; tensors exist only while they are written."""

    def __init__(
        self, tensors: list[Planned], progress: Progress, maker: ThreadPoolExecutor
    ) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._items = {_index(tensor): tensor for tensor in tensors}
        self._waiting = list(reversed(self._items))  # not asked for yet, next one last
        self._made: dict[MetadataIndex, Future[Tensor]] = {}
        self._maker, self._progress, self._done = maker, progress, 0
        self._total = sum(tensor.nbytes for tensor in tensors)

    def create_local_plan(self) -> SavePlan:
        items = []
        for index, tensor in self._items.items():
            assert index.offset is not None
            leading = () if tensor.layer is None else (1,)
            stacked = () if tensor.layers is None else (tensor.layers,)
            data = TensorWriteData(
                chunk=ChunkStorageMetadata(index.offset, torch.Size((*leading, *tensor.shape))),
                properties=TensorProperties(dtype=tensor.dtype),
                size=torch.Size((*stacked, *tensor.shape)),
            )
            items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        planned = self._items[write_item.index]
        future = self._made.pop(write_item.index, None)
        if future is None:  # the first one, or the writer has an order of its own
            self._waiting.remove(write_item.index)
            future = self._maker.submit(planned.make)
        tensor = future.result()
        assert tuple(tensor.shape) == planned.shape and tensor.dtype == planned.dtype, planned.key
        if self._waiting and not self._made:
            following = self._waiting.pop()
            self._made[following] = self._maker.submit(self._items[following].make)
        self._done += planned.nbytes
        self._progress(self._done, self._total)
        # The writer copies a view of something larger, so that only its own bytes are saved.
        return tensor.contiguous() if planned.layer is None else tensor.contiguous()[None]


def _index(tensor: Planned) -> MetadataIndex:
    leading = () if tensor.layer is None else (tensor.layer,)
    return MetadataIndex(
        tensor.key, torch.Size((*leading, *(0 for _ in tensor.shape))), tensor.layer or 0
    )


class _HashingFiles(FileSystem):
    """Files of tensors are hashed as they are written."""

    def __init__(self) -> None:
        self.digests: dict[str, list[Any]] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            if Path(path).suffix != ".distcp":
                yield stream
                return
            with ThreadPoolExecutor(1) as hasher:
                hashing = _HashingStream(stream, hasher)
                yield hashing
        self.digests[Path(path).name] = [hashing.size, hashing.sha256.hexdigest()]


class _HashingStream:
    """A file that is only ever appended to; hashing runs beside the writing."""

    def __init__(self, stream: Any, hasher: ThreadPoolExecutor) -> None:
        self._stream, self._hasher = stream, hasher
        self.sha256, self.size = hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        hashed = self._hasher.submit(self.sha256.update, data)
        written = self._stream.write(data)
        hashed.result()
        self.size += written
        return written

    def tell(self) -> int:
        return self.size

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
