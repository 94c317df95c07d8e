"""Checkpoints of a small run in one process, and ways to forge them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from dattn_mcore.checkpoint import folders
from dattn_mcore.checkpoint.load import choose_checkpoint, resume
from dattn_mcore.checkpoint.manifest import write_manifest
from dattn_mcore.checkpoint.save import CheckpointSaver
from dattn_mcore.config.schema import Config
from dattn_mcore.models.dattn import DattnModel
from dattn_mcore.parallel.groups import single_process
from dattn_mcore.training.model import build_from_config
from dattn_mcore.training.optimizer import build_optimizer, wrap_ddp

IDENTITY = {
    **{"content": "a", "usable": "b", "weights": [1.0], "tokenizer": "c", "template": "mistral"},
    **{"num_samples": 9, "num_usable": 9},
}


@dataclass
class SmallRun:
    """A model with its optimizer, without data: a step takes random gradients."""

    config: Config
    groups: ProcessGroupCollection
    chunks: list[DattnModel]
    optimizer: MegatronOptimizer
    saver: CheckpointSaver

    def step(self, seed: int) -> None:
        """One update."""
        generator = torch.Generator().manual_seed(seed)
        for chunk in self.chunks:
            for parameter in chunk.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.requires_grad:
                    parameter.main_grad.copy_(noise)
        self.optimizer.step()

    def weights(self) -> dict[str, torch.Tensor]:
        """A copy of all parameters."""
        named = self.chunks[0].named_parameters()
        return {name: parameter.detach().clone() for name, parameter in named}

    def resume(self) -> int:
        """Goes on from the newest whole checkpoint."""
        found = choose_checkpoint(self.saver.root)
        assert found is not None
        return resume(*found, self.chunks, self.optimizer, self.groups)


@contextlib.contextmanager
def small_run(root: Path, config: Config) -> Iterator[SmallRun]:
    """A run whose checkpoints lie in a folder."""
    with single_process() as groups:
        chunks = build_from_config(config, groups, torch.device("cpu"))
        optimizer = build_optimizer(config, wrap_ddp(chunks, config, groups))
        saver = CheckpointSaver(root, config, chunks, optimizer, groups, IDENTITY, "c", 300)
        try:
            yield SmallRun(config, groups, chunks, optimizer, saver)
        finally:
            saver.close()
            # Megatron-Core's optimizer is part of a circle that the collector cannot see: groups,
            # and 50 of their threads that wake up a hundred times a second, would stay for good.
            for part in getattr(optimizer, "chained_optimizers", [optimizer]):
                vars(part).clear()


class Attack:
    """Makes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


def payload(target: Path) -> bytes:
    """What `torch.load` reads, and `weights_only=False` runs."""
    stream = io.BytesIO()
    torch.save([Attack(target)], stream)
    return stream.getvalue()


def read_index(folder: Path) -> Metadata:
    """The index as plain pickle reads it."""
    index: Metadata = pickle.loads((folder / ".metadata").read_bytes())
    return index


def point_at(folder: Path, key: str, data: bytes, as_bytes: bool) -> None:
    """Appends data to a shard, and has the index name it as the content of a key.

    Args:
        folder: a checkpoint.
        key: of a tensor or of a byte entry.
        data: the new content.
        as_bytes: the index calls it a byte entry, with the tensor's size still beside it.
    """
    index = read_index(folder)
    for place, stored in index.storage_data.items():
        if place.fqn == key:
            shard = folder / stored.relative_path
            start = shard.stat().st_size
            with shard.open("ab") as file:
                file.write(data)
            index.storage_data[place] = replace(stored, offset=start, length=len(data))
    if as_bytes:
        old, new = index.state_dict_metadata[key], BytesStorageMetadata()
        vars(new).update(vars(old))
        index.state_dict_metadata[key] = new
        place = next(place for place in index.storage_data if place.fqn == key)
        index.storage_data[type(place)(key)] = index.storage_data.pop(place)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    vouch(folder)


def vouch(folder: Path, **changes: Any) -> None:
    """A manifest that is right about every file and itself, and says what else it is given."""
    fields = json.loads((folder / "dattn.json").read_text()) | changes
    for name in fields["files"]:
        path = folder / name
        fields["files"][name] = [path.stat().st_size, folders.digest(path)]
    seal(folder, fields)


def seal(folder: Path, fields: dict[str, Any]) -> None:
    """Writes a manifest with a digest that is right, where its format has one."""
    if fields.get("format") == 1:
        (folder / "dattn.json").write_text(json.dumps(fields))
    else:
        write_manifest(folder, fields, fields.get("files", {}))
