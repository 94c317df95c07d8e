"""Compares two folders or checkpoints tensor by tensor, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dattn_mcore.architectures.parameters import Entry, Shape
from dattn_mcore.architectures.tables import model_table
from dattn_mcore.checkpoint.mixing import split
from dattn_mcore.config.schema import AttentionConfig, ModelConfig
from dattn_mcore.errors import CheckpointError
from tools.checkpoint_convert.adapted_checkpoint import open_checkpoint
from tools.checkpoint_convert.hf_to_mcore import read_hf_config, read_model
from tools.checkpoint_convert.raw_folders import (
    TEXT_TYPES,
    VISION_TYPES,
    open_language_model,
    open_vision_tower,
    read_json,
    same_bits,
    text_config,
    vision_config,
)
from tools.checkpoint_convert.safetensors_folder import SafetensorsFolder
from tools.checkpoint_convert.tables import check_keys, dtype_group, mcore_shapes
from tools.checkpoint_convert.workers import Progress

ALL = frozenset({"vision", "projector", "positions", "llm"})
SMALL = 50_000_000  # parameters up to which logits are compared
LOGITS_BOUND = 1e-4  # two implementations in float32 order their sums differently


@dataclass
class Weights:
    """One side of a comparison; tensors go by the names of an export.

    Attributes:
        kind: `checkpoint`, `export`, `language model` or `tower`.
        parts: which parts of a model it holds.
        model: sizes; of a part alone, the other sizes mean nothing.
        attention: None for a part alone.
        read: reads one tensor.
        ignored: tensors in the folder that are left out by rule.
    """

    path: Path
    kind: str
    parts: frozenset[str]
    model: ModelConfig
    attention: AttentionConfig | None
    shapes: dict[str, Shape]
    dtypes: dict[str, torch.dtype]
    read: Callable[[str], Tensor]
    ignored: int = 0


@dataclass(frozen=True)
class Comparison:
    """What was found.

    Attributes:
        tensors: how many were compared.
        parameters: how many numbers they hold.
        differences: one line each; empty if all is equal.
        logits: largest difference of the logits; None where they were not computed.
    """

    tensors: int
    parameters: int
    differences: list[str]
    logits: float | None = None


def verify(
    first: str | Path, second: str | Path, progress: Progress = lambda done, total: None
) -> Comparison:
    """Compares settings, names, shapes, dtypes and bits; at small sizes also logits.

    A language model's or a tower's own folder is compared with that part of the other side. The
    padding of the vocabulary belongs to a checkpoint's layout and is not compared.

    Raises:
        CheckpointError: one side is damaged or no model, or the two have no part in common.
    """
    a = open_weights(Path(first), -1)
    b = open_weights(Path(second), a.model.vision.select_layer)
    if a.kind == "tower" and a.model.vision.select_layer != b.model.vision.select_layer:
        a = open_weights(Path(first), b.model.vision.select_layer)
    parts = a.parts & b.parts
    if not parts:
        raise CheckpointError(
            f"{first} is a {a.kind} and {second} a {b.kind}; they have nothing to compare"
        )
    differences = _settings(a, b, parts)
    names = [name for name in a.shapes if dtype_group(name) in parts]
    others = [name for name in b.shapes if dtype_group(name) in parts]
    differences += [f"{name} is missing in {b.path}" for name in names if name not in b.shapes]
    differences += [f"{name} is missing in {a.path}" for name in others if name not in a.shapes]
    common = [n for n in (others if b.kind == "checkpoint" else names) if n in a.shapes]
    common = [name for name in common if name in b.shapes]
    total = sum(_nbytes(a, name) for name in common)
    done = 0
    for name in common:
        difference = _difference(a, b, name)
        if difference is not None:
            differences.append(f"{name}: {difference}")
        done += _nbytes(a, name)
        progress(done, total)
    parameters = sum(torch.Size(a.shapes[name]).numel() for name in common)
    logits = None
    if parts == ALL and not differences and parameters <= SMALL:
        from tools.checkpoint_convert.logits import fixed_logits

        exports = [side.path for side in (a, b) if side.kind == "export"]
        avoid = frozenset(read_hf_config(path).image_token_id for path in exports)
        left, right = (fixed_logits(side.path, avoid) for side in (a, b))
        logits = float((left - right).abs().max())
        if not logits <= LOGITS_BOUND:
            differences.append(
                f"logits on a fixed input differ by {logits:.3g} (bound {LOGITS_BOUND:g})"
            )
    return Comparison(len(common), parameters, differences, logits)


def open_weights(path: Path, select_layer: int) -> Weights:
    """Opens whatever stands behind a path.

    Args:
        path: checkpoint, run folder, export, or a language model's or tower's own folder.
        select_layer: for a tower's own folder, which does not say it.

    Raises:
        CheckpointError: it is none of these, or damaged.
    """
    if not (path / "config.json").is_file():
        return _open_checkpoint(path)
    kind = str(read_json(path / "config.json").get("model_type"))
    if kind in TEXT_TYPES:
        family, llm = text_config(path)
        opened = open_language_model(path, llm.tie_embeddings)
        model = replace(ModelConfig(), family=family, llm=llm)
        parts, name = frozenset({"llm"}), "language model"
    elif kind in VISION_TYPES:
        vision = vision_config(path, select_layer)
        opened = open_vision_tower(path, vision)
        model = replace(ModelConfig(), vision=vision)
        parts, name = frozenset({"vision"}), "tower"
    else:
        model, attention = read_model(path, vocab_pad_multiple=1)
        folder = SafetensorsFolder(path)
        shapes, dtypes = folder.shapes, folder.dtypes
        return Weights(path, "export", ALL, model, attention, shapes, dtypes, folder.read)
    return Weights(
        path,
        name,
        parts,
        model,
        None,
        opened.shapes,
        opened.dtypes,
        opened.read,
        ignored=len(opened.ignored),
    )


def _open_checkpoint(path: Path) -> Weights:
    source = open_checkpoint(path)
    model = source.config.model
    table = model_table(model)
    check_keys(str(source.path), mcore_shapes(table), source.shapes, source.dtypes)
    places: dict[str, tuple[Entry, int | None, int]] = {}
    shapes: dict[str, Shape] = {}
    dtypes: dict[str, torch.dtype] = {}
    fallback = source.dtypes["vision.patch_embedding.weight"]
    for entry in table:
        for layer in entry.steps():
            for part, name in enumerate(entry.names(layer)):
                places[name] = (entry, layer, part)
                shapes[name] = list(entry.parts.values())[part]
                dtypes[name] = fallback if entry.key is None else source.dtypes[entry.key]
    last: dict[Any, list[Tensor]] = {}  # q, k and v come out of one tensor, one after another

    def read(name: str) -> Tensor:
        entry, layer, part = places[name]
        if entry.key is None:
            return torch.zeros(shapes[name], dtype=dtypes[name])
        if (entry.key, layer) not in last:
            last.clear()
            last[entry.key, layer] = split(entry, source.read(entry.key, layer))
        return last[entry.key, layer][part]

    attention = source.config.attention
    return Weights(source.path, "checkpoint", ALL, model, attention, shapes, dtypes, read)


def _settings(a: Weights, b: Weights, parts: frozenset[str]) -> list[str]:
    """Settings of the compared parts that differ and change what the model computes."""
    pairs: list[tuple[str, Any, Any, tuple[str, ...]]] = []
    if "llm" in parts:
        unread = ("init_std", "vocab_pad_multiple")
        pairs.append(("model.llm", a.model.llm, b.model.llm, unread))
    if "vision" in parts:
        pairs.append(("model.vision", a.model.vision, b.model.vision, ("init_std",)))
    if parts == ALL:
        pairs.append(("model.projector", a.model.projector, b.model.projector, ()))
        pairs.append(("attention", a.attention, b.attention, ("backend",)))
        pairs.append(("model", a.model, b.model, ("llm", "vision", "projector")))
    differences = []
    for section, ours, theirs, free in pairs:
        for name in vars(ours):
            left, right = getattr(ours, name), getattr(theirs, name)
            if name == "query_scale":
                left, right = left or ours.head_dim, right or theirs.head_dim
            if name == "layer_pattern":  # several patterns may mean the same
                left, right = ours.windows, theirs.windows
            if left != right and name not in free:
                differences.append(f"{section}.{name}: {left} and {right}")
    return differences


def _difference(a: Weights, b: Weights, name: str) -> str | None:
    if a.shapes[name] != b.shapes[name]:
        return f"shapes {list(a.shapes[name])} and {list(b.shapes[name])}"
    if a.dtypes[name] != b.dtypes[name]:
        kinds = (str(side.dtypes[name]).removeprefix("torch.") for side in (a, b))
        return f"dtypes {' and '.join(kinds)}"
    left, right = a.read(name), b.read(name)
    if same_bits(left, right):
        return None
    width = left.element_size()
    as_bytes = (t.contiguous().reshape(-1).view(torch.uint8).view(-1, width) for t in (left, right))
    count = int(torch.ne(*as_bytes).any(dim=1).sum())
    largest = float((left.float() - right.float()).abs().max())
    return f"{count} of {left.numel()} values differ, the largest difference is {largest:.3g}"


def _nbytes(side: Weights, name: str) -> int:
    return torch.Size(side.shapes[name]).numel() * side.dtypes[name].itemsize
