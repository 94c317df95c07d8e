"""Sharded safetensors: planned first, then written tensor by tensor; read by name."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dattn_mcore.errors import CheckpointError
from tools.checkpoint_convert.mapping import Shape

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class SafetensorsWriter:
    """Writes tensors in the order announced; a file goes to disk when its last tensor came."""

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, tuple[Shape, torch.dtype]],
        max_shard_bytes: int,
    ) -> None:
        self.folder = folder
        sizes = {
            name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in tensors.items()
        }
        groups: list[list[str]] = [[]]
        filled = 0
        for name, size in sizes.items():
            if groups[-1] and filled + size > max_shard_bytes:
                groups.append([])
                filled = 0
            groups[-1].append(name)
            filled += size
        count = len(groups)
        self._file_of = {
            name: SINGLE if count == 1 else f"model-{i:05d}-of-{count:05d}.safetensors"
            for i, group in enumerate(groups, start=1)
            for name in group
        }
        self._left = {self._file_of[group[0]]: len(group) for group in groups}
        self._waiting: dict[str, dict[str, Tensor]] = {file: {} for file in self._left}
        if count > 1:
            index = {
                "metadata": {"total_size": sum(sizes.values())},
                "weight_map": dict(sorted(self._file_of.items())),
            }
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes one tensor; writes its file if it was the last one missing."""
        file = self._file_of[name]
        self._waiting[file][name] = tensor.contiguous()
        self._left[file] -= 1
        if self._left[file] == 0:
            save_file(self._waiting.pop(file), self.folder / file, metadata={"format": "pt"})

    def close(self) -> None:
        """Checks that every announced tensor came."""
        assert not self._waiting, f"tensors never written to {sorted(self._waiting)}"


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
        self._file_of: dict[str, Path] = {}
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        promised = self._read_index()
        for file in sorted(set(promised.values())) if promised else [self.folder / SINGLE]:
            for name, shape, dtype in _header(file):
                if promised and promised.get(name) != file:
                    raise CheckpointError(
                        f"{file} holds {name}, which {INDEX} does not place there; the index "
                        "belongs to other files"
                    )
                self._file_of[name], self.shapes[name], self.dtypes[name] = file, shape, dtype
        lost = sorted(set(promised) - set(self._file_of))
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
            if Path(file).name != file:
                raise CheckpointError(
                    f"{path} names {file!r}; an index may only name files of its own folder"
                )
        return {name: self.folder / file for name, file in places.items()}

    def read(self, name: str) -> Tensor:
        """Reads one tensor."""
        with safe_open(self._file_of[name], framework="pt") as opened:
            return opened.get_tensor(name)


def _header(file: Path) -> Iterator[tuple[str, Shape, torch.dtype]]:
    """Names, shapes and dtypes in one file; tensors are not read."""
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; copy the folder again")
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dictionary)
                part = opened.get_slice(name)
                yield name, tuple(part.get_shape()), _DTYPES[part.get_dtype()]
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
