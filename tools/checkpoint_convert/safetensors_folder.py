"""Sharded safetensors: planned first, then written tensor by tensor; read by name."""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dattn_mcore.architectures.parameters import Shape
from dattn_mcore.errors import CheckpointError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MADV_POPULATE_READ = 22  # of Linux 5.14; Python has no name for it
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class SafetensorsWriter:
    """Writes tensors, announced beforehand, in any order, from any thread and any fork.

    A file's header is written first; a tensor goes straight to its place in the file, so nothing
    waits in memory.
    """

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, tuple[Shape, torch.dtype]],
        max_shard_bytes: int,
    ) -> None:
        self._sizes = {
            name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in tensors.items()
        }
        groups: list[list[str]] = [[]]
        filled = 0
        for name, size in self._sizes.items():
            if groups[-1] and filled + size > max_shard_bytes:
                groups.append([])
                filled = 0
            groups[-1].append(name)
            filled += size
        self._files: list[BinaryIO] = []
        self._place: dict[str, tuple[BinaryIO, int]] = {}
        weight_map: dict[str, str] = {}
        for number, group in enumerate(groups, start=1):
            single = len(groups) == 1
            file = SINGLE if single else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            self._begin(folder / file, {name: tensors[name] for name in group})
            weight_map |= dict.fromkeys(group, file)
        if len(groups) > 1:
            index = {
                "metadata": {"total_size": sum(self._sizes.values())},
                "weight_map": dict(sorted(weight_map.items())),
            }
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _begin(self, path: Path, tensors: dict[str, tuple[Shape, torch.dtype]]) -> None:
        """Opens a file and writes its header; wide dtypes come first, so that all are aligned."""
        names = {dtype: name for name, dtype in _DTYPES.items()}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offsets, end = {}, 0
        for name in sorted(tensors, key=lambda name: -tensors[name][1].itemsize):
            shape, dtype = tensors[name]
            offsets[name], end = end, end + self._sizes[name]
            header[name] = {
                "dtype": names[dtype],
                "shape": list(shape),
                "data_offsets": [offsets[name], end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = path.open("wb", buffering=0)
        self._files.append(file)
        file.write(len(text).to_bytes(8, "little") + text)
        start = 8 + len(text)
        file.truncate(start + end)
        self._place |= {name: (file, start + offset) for name, offset in offsets.items()}

    def add(self, name: str, tensor: Tensor) -> None:
        """Writes one tensor."""
        file, offset = self._place[name]
        array: Any = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        data = memoryview(array)
        assert len(data) == self._sizes[name], name
        while len(data):  # one call writes 2 GiB at most
            written = os.pwrite(file.fileno(), data, offset)
            data, offset = data[written:], offset + written

    def close(self, written: Iterable[str]) -> None:
        """Checks that every announced tensor came once, and waits until all is on the disk."""
        names = sorted(written)
        assert names == sorted(self._place), "tensors were left out, or written twice"
        for file in self._files:
            os.fsync(file.fileno())

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()


class SafetensorsFolder:
    """A folder of safetensors, single or with an index.

    Attributes:
        shapes: shape of every tensor.
        dtypes: dtype of every tensor.
    """

    def __init__(self, folder: str | Path) -> None:
        """Reads the headers.

        Raises:
            CheckpointError: a file is missing or damaged, or the index points outside the folder.
        """
        self.folder = Path(folder)
        self._places: dict[str, tuple[Path, int]] = {}
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        promised = self._read_index()
        pickles = sorted(file.name for end in PICKLES for file in self.folder.glob(f"*{end}"))
        if not promised and pickles and not (self.folder / SINGLE).is_file():
            raise CheckpointError(
                f"{self.folder} holds pickled weights ({pickles[0]}); only safetensors are read, "
                "because a pickle can run code: save it again with save_pretrained of transformers"
            )
        shards = sorted(file.name for file in self.folder.glob("*.safetensors"))
        if not promised and shards and SINGLE not in shards:
            raise CheckpointError(
                f"{self.folder / INDEX} is missing, which says what {shards[0]} and the other "
                "safetensors hold; copy the folder again"
            )
        for file in sorted(set(promised.values())) if promised else [self.folder / SINGLE]:
            for name, shape, dtype, offset in _header(file):
                if promised and promised.get(name) != file:
                    raise CheckpointError(
                        f"{file} holds {name}, which {INDEX} does not place there; the index "
                        "belongs to other files"
                    )
                self._places[name] = file, offset
                self.shapes[name], self.dtypes[name] = shape, dtype
        lost = sorted(set(promised) - set(self._places))
        if lost:
            raise CheckpointError(
                f"{self.folder / INDEX} names {', '.join(lost)}, which its file does not hold; "
                "copy the folder again"
            )

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(
            math.prod(shape) * self.dtypes[name].itemsize for name, shape in self.shapes.items()
        )

    def _read_index(self) -> dict[str, Path]:
        path = self.folder / INDEX
        if not path.is_file():
            return {}
        try:
            weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            places = {str(name): str(file) for name, file in weight_map.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{path} is no index; copy the folder again") from None
        for file in places.values():
            if Path(file).name != file or file == "..":
                raise CheckpointError(
                    f"{path} names {file!r}; an index may only name files of its own folder"
                )
        return {name: self.folder / file for name, file in places.items()}

    def read(self, name: str) -> Tensor:
        """Reads one tensor: its pages of the file are in memory, and are the tensor.

        Copying them would cost more than everything else that a conversion does with them. They
        are read at once and here, not by page faults of whoever writes the tensor out.

        Raises:
            CheckpointError: the file has become unreadable or shorter.
        """
        file, offset = self._places[name]
        shape, dtype = self.shapes[name], self.dtypes[name]
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes == 0:
            return torch.empty(shape, dtype=dtype)
        skipped = offset % mmap.ALLOCATIONGRANULARITY
        try:
            with file.open("rb", buffering=0) as opened:
                os.posix_fadvise(opened.fileno(), offset, nbytes, os.POSIX_FADV_WILLNEED)
                pages = mmap.mmap(
                    opened.fileno(),
                    skipped + nbytes,
                    access=mmap.ACCESS_COPY,
                    offset=offset - skipped,
                )
            pages.madvise(_MADV_POPULATE_READ)
        except (OSError, ValueError) as error:
            if not isinstance(error, OSError) or error.errno != errno.EINVAL:  # an older kernel's
                reason = getattr(error, "strerror", None) or error
                raise CheckpointError(
                    f"{file} cannot be read ({reason}); copy the folder again"
                ) from None
        return torch.frombuffer(pages, dtype=dtype, count=math.prod(shape), offset=skipped).reshape(
            shape
        )


def _header(file: Path) -> Iterator[tuple[str, Shape, torch.dtype, int]]:
    """Names, shapes, dtypes and places in one file; tensors are not read."""
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; copy the folder again")
    try:
        with safe_open(file, framework="pt"):  # checks that header and size fit each other
            pass
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
        for name, entry in header.items():
            if name != "__metadata__":
                start = 8 + length + entry["data_offsets"][0]
                if entry["dtype"] not in _DTYPES:
                    raise CheckpointError(
                        f"{file}: {name} is {entry['dtype']}; weights must be bfloat16, float16 or "
                        "float32, so give the model that was not quantised"
                    )
                yield name, tuple(entry["shape"]), _DTYPES[entry["dtype"]], start
    except (SafetensorError, OSError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{file} is damaged ({reason}); copy it again") from None


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
