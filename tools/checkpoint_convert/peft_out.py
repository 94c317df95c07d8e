"""Adapters of a checkpoint as a folder of `peft`, to be loaded on the export of their base."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dattn_mcore.architectures.adapters import adapter_table, summed_weight
from dattn_mcore.architectures.parameters import Entry, part_of
from dattn_mcore.architectures.tables import model_table
from dattn_mcore.checkpoint.base_sums import Sums, sums_of
from dattn_mcore.checkpoint.folders import damage
from dattn_mcore.checkpoint.mixing import split
from dattn_mcore.checkpoint.peft_folder import peft_name, write_peft_folder
from dattn_mcore.errors import CheckpointError
from tools.checkpoint_convert.adapted_checkpoint import AdaptedCheckpoint
from tools.checkpoint_convert.atomic_folder import AtomicFolder
from tools.checkpoint_convert.dist_checkpoint import DistCheckpoint


def write_peft(
    checkpoint: str | Path,
    output: str | Path,
    base: str | None = None,
    *,
    name: str | None = None,
    ema: bool = False,
) -> str:
    """Writes a folder that `peft` loads on the export of the base.

    Parts that learnt as a whole beside the adapters go with them, as `modules_to_save`.

    Args:
        checkpoint: of adapters, or its run folder.
        output: folder to make.
        base: where the checkpoint of the base is now; None: where it was.
        name: of the exported base model, that the folder names; None: none.
        ema: write the running mean of what has learnt.

    Returns:
        One line that says what was written.

    Raises:
        CheckpointError: it holds no adapters or cannot be read, or its language model learnt more
            than adapters.
    """
    source = AdaptedCheckpoint(DistCheckpoint(checkpoint, ema=ema), base)
    files = {file: [size, sha256] for file, (size, sha256) in source.own.digests.items()}
    if problem := damage(source.path, sorted(files), files):
        raise CheckpointError(f"{source.path}: {problem}; use an earlier checkpoint")
    model = source.config.model
    adapted = adapter_table(model, source.adapters)
    others = sorted(source.learnt - {entry.key for entry in adapted})
    parts = sorted({part_of(key) for key in others})
    if "llm" in parts:
        key = next(key for key in others if part_of(key) == "llm")
        raise CheckpointError(
            f"{source.path}: {key} learnt beside the adapters, which a folder of peft cannot hold; "
            "export with --adapter merged"
        )
    tensors: dict[str, Tensor] = {}
    for entry in adapted:
        tensors.update(_tensors(source, entry))
    for entry in model_table(model):
        if part_of(next(iter(entry.parts))) in parts:
            found = _tensors(source, entry)
            tensors.update((peft_name(key), value) for key, value in found.items())
    with AtomicFolder(output) as folder:
        write_peft_folder(
            folder,
            source.adapters,
            tensors,
            base=name,
            base_sums=_sums_of_base(source),
            parts=parts,
        )
    what = f" and {' and '.join(parts)}" if parts else ""
    return f"{len(source.adapters.targets)} adapters{what} of base {source.base.path}"


def _sums_of_base(source: AdaptedCheckpoint) -> Sums:
    key = summed_weight(source.config.model).key
    assert key is not None
    first, second = sums_of(source.base.read(key, 0)).tolist()
    return first, second


def _tensors(source: AdaptedCheckpoint, entry: Entry) -> dict[str, Tensor]:
    """The Hugging Face tensors of a line, by name."""
    found: dict[str, Tensor] = {}
    for layer in entry.steps():
        if entry.key is None:
            parts = [torch.zeros(shape) for shape in entry.parts.values()]
        else:
            parts = split(entry, source.read(entry.key, layer))
        found.update(zip(entry.names(layer), parts, strict=True))
    return found
