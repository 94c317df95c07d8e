"""The mean of the weights of several checkpoints, as a checkpoint that a run can start from.

Tensors are read and written one layer at a time and added up in float64, so that the order of the
checkpoints makes no difference that the result could show.
"""

from __future__ import annotations

import functools
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dattn_mcore.architectures.parameters import in_order_of_layers
from dattn_mcore.architectures.tables import model_table
from dattn_mcore.checkpoint.folders import list_checkpoints, whole_manifest
from dattn_mcore.config.load import to_dict
from dattn_mcore.errors import CheckpointError
from tools.checkpoint_convert.atomic_folder import AtomicFolder, check_free
from tools.checkpoint_convert.dist_checkpoint import DistCheckpoint, write_checkpoint
from tools.checkpoint_convert.following_digest import FollowingDigest
from tools.checkpoint_convert.streaming import Planned
from tools.checkpoint_convert.tables import check_keys, mcore_shapes
from tools.checkpoint_convert.workers import Progress

AverageDtype = Literal["same", "float32"]
_WITHOUT_EFFECT = ("init_std", "output_norm_init", "transformer_impl")  # on trained weights
_MODES = ("v2v", "t2v_position", "merge")  # of the attention: what weights are trained for


@dataclass(frozen=True)
class AverageOptions:
    """What a user may choose.

    Attributes:
        last: so many of the newest checkpoints of a run folder; None: all of them.
        dtype: of the result: that of the checkpoints, or float32.
        ema: take the running mean of the weights of each checkpoint.
    """

    last: int | None = None
    dtype: AverageDtype = "same"
    ema: bool = False


def average(
    given: list[str] | list[Path],
    output: str | Path,
    options: AverageOptions | None = None,
    progress: Progress = lambda done, total: None,
) -> list[Path]:
    """Writes the mean of checkpoints as converted weights are written (`checkpoint.init_from`).

    Args:
        given: one run folder, or checkpoints.
        output: checkpoint folder to make.
        options: see `AverageOptions`.
        progress: called after every tensor with bytes done and in all.

    Returns:
        The checkpoints that were averaged.

    Raises:
        CheckpointError: one is damaged, they are of different models or tokenizers, there are too
            few, or the output exists.
    """
    options = options or AverageOptions()
    check_free(output)
    sources = [DistCheckpoint(path, ema=options.ema) for path in _chosen(given, options)]
    first = sources[0]
    table = model_table(first.config.model)
    for source in sources:
        if source.of_base is not None:
            raise CheckpointError(
                f"{source.path} holds adapters alone, beside the weights of "
                f"{source.of_base['path']}; average whole models: export each merged (mcore-to-hf) "
                "and take it back (hf-to-mcore)"
            )
        _check_alike(first, source)
        check_keys(str(source.path), mcore_shapes(table), source.shapes, source.dtypes)
    with ExitStack() as stack:
        behind = [
            stack.enter_context(FollowingDigest(source.path, source.digests)) for source in sources
        ]
        planned = []
        for entry, layer in in_order_of_layers(table):
            if entry.key is not None:
                kind = torch.float32 if options.dtype == "float32" else first.dtypes[entry.key]
                make = functools.partial(_mean, sources, behind, entry.key, layer, kind)
                shape = entry.layer_shape()
                planned.append(Planned(entry.key, layer, entry.layers, shape, kind, make))
        with AtomicFolder(output) as folder:
            write_checkpoint(folder, planned, first.config, progress, tokenizer=first.tokenizer)
            for one in behind:
                one.finish()
    return [source.path for source in sources]


def _mean(
    sources: list[DistCheckpoint],
    behind: list[FollowingDigest],
    key: str,
    layer: int | None,
    dtype: torch.dtype,
) -> Tensor:
    """The mean of a tensor, or of one layer of a stacked one."""
    total: Tensor | None = None
    for source, digest in zip(sources, behind, strict=True):
        tensor = source.read_exact(key, layer)
        total = tensor.double() if total is None else total.add_(tensor)
        digest.follow(*source.place(key, layer))
    assert total is not None
    return total.div_(len(sources)).to(dtype)


def _chosen(given: list[str] | list[Path], options: AverageOptions) -> list[Path]:
    """The checkpoints that are meant, newest first where a run folder is named.

    Raises:
        CheckpointError: there are too few.
    """
    paths = [Path(path) for path in given]
    if len(paths) > 1:
        if options.last is not None:
            raise CheckpointError("--last takes one run folder; name that, or leave --last out")
        return paths
    (path,) = paths
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    of_run = [folder for folder in list_checkpoints(root) if whole_manifest(folder) is not None]
    if not of_run and options.ema and options.last is None:
        return paths  # of one checkpoint: its mean becomes weights
    least = options.last or (1 if options.ema else 2)
    if len(of_run) < least:
        have = f"holds {len(of_run)} whole checkpoint{'' if len(of_run) == 1 else 's'}"
        raise CheckpointError(
            f"{path} {have}, and the mean is of {options.last or 'at least 2'}; raise "
            "checkpoint.keep or set checkpoint.keep_every in the run, or name other checkpoints"
        )
    return of_run[: options.last]


def _check_alike(first: DistCheckpoint, other: DistCheckpoint) -> None:
    """Refuses checkpoints whose weights do not mean the same.

    Raises:
        CheckpointError: names what differs.
    """
    ours, theirs = to_dict(first.config), to_dict(other.config)
    modes = [{name: side["attention"][name] for name in _MODES} for side in (ours, theirs)]
    difference = _difference("model", ours["model"], theirs["model"])
    if difference := difference or _difference("attention", *modes):
        raise CheckpointError(
            f"{other.path} is of another model than {first.path}: {difference}; only checkpoints "
            "of one model have a mean"
        )
    for key, dtype in first.dtypes.items():
        if other.dtypes.get(key, dtype) != dtype:
            raise CheckpointError(
                f"{other.path} has {key} in {_name(other.dtypes[key])} and {first.path} in "
                f"{_name(dtype)}; average checkpoints of one train.precision"
            )
    prints = [source.tokenizer.get("fingerprint") for source in (first, other)]
    if None not in prints and prints[0] != prints[1]:
        raise CheckpointError(
            f"{other.path} was trained with another tokenizer than {first.path}: their rows of the "
            "vocabulary mean other tokens; average checkpoints of one data.tokenizer"
        )


def _difference(name: str, ours: object, theirs: object) -> str | None:
    """The first setting that differs, with both values."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in ours:
            found = _difference(f"{name}.{key}", ours[key], theirs.get(key))
            if found and key not in _WITHOUT_EFFECT:
                return found
        return None
    return None if ours == theirs else f"{name} is {theirs!r} there and {ours!r} here"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
