"""Reads `.metadata` of a checkpoint without running code from it.

PyTorch keeps the file index of a distributed checkpoint as a pickle; PyTorch and Megatron-Core read
it with plain `pickle.load`, which calls whatever the file names. Everything that reads a checkpoint
here goes through this file first: a name that no index needs is refused before anything is called.
What the index may say about the other files is checked in `content`.
"""

from __future__ import annotations

import pickle
from enum import Enum, EnumMeta
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from dattn_mcore.errors import CheckpointError

NAME = ".metadata"
_METADATA, _PLANNER = (f"torch.distributed.checkpoint.{x}" for x in ("metadata", "planner"))
# What indices consist of: PyTorch's, and the save plans that Megatron-Core adds.
NEEDED = frozenset(
    {
        (_METADATA, "Metadata"),
        (_METADATA, "MetadataIndex"),
        (_METADATA, "StorageMeta"),
        (_METADATA, "TensorStorageMetadata"),
        (_METADATA, "BytesStorageMetadata"),
        (_METADATA, "ChunkStorageMetadata"),
        (_METADATA, "TensorProperties"),
        (_METADATA, "_MEM_FORMAT_ENCODING"),
        (_PLANNER, "SavePlan"),
        (_PLANNER, "WriteItem"),
        (_PLANNER, "WriteItemType"),
        (_PLANNER, "TensorWriteData"),
        (_PLANNER, "BytesIOWriteData"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("pathlib._local", "PosixPath"),
    }
)


class _Unpickler(pickle.Unpickler):
    """Knows the names of an index only."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) not in NEEDED and not is_dtype:
            raise _refused(f"{module}.{name}")
        return super().find_class(module, name)


def _member(owner: Any, name: str) -> Enum:
    """What `getattr` may be in an index: Python 3.11.0 to 3.11.3 write a member of an enum so."""
    if not (isinstance(owner, EnumMeta) and name in owner.__members__):
        raise _refused("builtins.getattr")
    member: Enum = owner.__members__[name]
    return member


def _refused(name: str) -> CheckpointError:
    return CheckpointError(
        f"names {name}, which no checkpoint needs and which could run code; "
        "take a checkpoint from a place you trust"
    )


def read_metadata(folder: Path) -> Metadata:
    """Reads the file index of a checkpoint.

    Raises:
        CheckpointError: it is missing or damaged, or names what an index does not need.
    """
    path = folder / NAME
    try:
        with path.open("rb") as file:
            metadata = _Unpickler(file).load()
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from None
    except Exception as error:  # noqa: BLE001 (a damaged pickle can raise anything)
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}); the checkpoint is damaged, use an "
            "earlier one"
        ) from None
    parts = [getattr(metadata, name, None) for name in ("state_dict_metadata", "storage_data")]
    if not (isinstance(metadata, Metadata) and all(isinstance(part, dict) for part in parts)):
        raise CheckpointError(f"{path} is no index of a checkpoint; use an earlier checkpoint")
    keys = [*metadata.state_dict_metadata, *(place.fqn for place in metadata.storage_data)]
    if not all(type(key) is str for key in keys):
        raise CheckpointError(f"{path} is no index of a checkpoint; use an earlier checkpoint")
    return metadata
