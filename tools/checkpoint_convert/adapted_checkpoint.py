"""A checkpoint of adapters and its base, read as one model: adapters are added to the weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dattn_mcore.architectures.adapters import (
    AdaptedLinear,
    adapted_linears,
    adapter_entries,
    adapter_table,
)
from dattn_mcore.checkpoint.adapters import check_base
from dattn_mcore.checkpoint.mixing import join, split
from dattn_mcore.config.lora import adapters_of
from dattn_mcore.errors import CheckpointError
from tools.checkpoint_convert.dist_checkpoint import DistCheckpoint


class AdaptedCheckpoint(DistCheckpoint):
    """What a run with adapters has saved, beside the checkpoint that it started from.

    Attributes:
        own: the checkpoint of the adapters.
        base: the other one.
        adapters: of the run.
        learnt: keys of the tensors that stand in the former.
        shapes: of the whole model; likewise `dtypes`, `digests`, `place` and `read`.
    """

    def __init__(self, own: DistCheckpoint, base: str | Path | None = None) -> None:
        """Opens the base.

        Args:
            own: the checkpoint of the adapters.
            base: where their base is now; None: where it was.

        Raises:
            CheckpointError: it is missing or unreadable, or another one.
        """
        adapters = adapters_of(own.config)
        if own.of_base is None or adapters is None:
            raise CheckpointError(f"{own.path} holds a whole model, no adapters")
        place = Path(base or own.of_base["path"])
        if base is None and not place.exists():
            raise CheckpointError(
                f"{own.path} holds adapters of {place}, which is not there; name their base by "
                "--base"
            )
        self.own, self.base, self.adapters = own, DistCheckpoint(place), adapters
        check_base({"base": own.of_base}, own.path, self.base.path, "--base")
        self.path, self.config, self.step, self.ema = own.path, own.config, own.step, own.ema
        self.tokenizer, self.ignored, self.of_base = own.tokenizer, own.ignored, own.of_base
        for entry in adapter_table(own.config.model, adapters):
            if own.shapes.get(entry.key or "") != entry.mcore_shape():
                raise CheckpointError(
                    f"{own.path}: {entry.key} is missing or has another shape than "
                    f"{list(entry.mcore_shape())}; use another checkpoint"
                )
        self.learnt = frozenset(own.shapes)
        self.shapes, self.dtypes = dict(self.base.shapes), dict(self.base.dtypes)
        for key in self.learnt & self.shapes.keys():
            self.shapes[key], self.dtypes[key] = own.shapes[key], own.dtypes[key]
        self._adapted: dict[str, list[AdaptedLinear]] = {}
        for linear in adapted_linears(own.config.model, adapters):
            assert linear.entry.key is not None
            self._adapted.setdefault(linear.entry.key, []).append(linear)

    @property
    def digests(self) -> dict[str, tuple[int, str]]:
        """Size and SHA-256 of every file of both."""
        base = {str(self.base.path.absolute() / name): v for name, v in self.base.digests.items()}
        return {**base, **self.own.digests}

    def place(self, key: str, layer: int | None = None) -> tuple[str, int]:
        """File and offset where most of a tensor is read."""
        if key in self.learnt:
            return self.own.place(key, layer)
        name, offset = self.base.place(key, layer)
        return (str(self.base.path.absolute() / name) if name else "", offset)

    def read(self, key: str, layer: int | None = None) -> Tensor:
        """Reads a tensor of the model, adapters added, or one of an adapter."""
        if key in self.learnt:
            return self.own.read(key, layer)
        tensor = self.base.read(key, layer)
        for linear in self._adapted.get(key, ()):
            if layer in linear.layers:
                tensor = self._merged(linear, tensor, linear.layers.index(layer))
        return tensor

    def _merged(self, linear: AdaptedLinear, weight: Tensor, place: int) -> Tensor:
        """W + scale B A of each adapted part, with DoRA brought to the length of its rows.

        Args:
            linear: which.
            weight: of one layer.
            place: of this layer among those that have the adapter.
        """
        entries = adapter_entries(linear, self.adapters)
        a, b, *magnitude = (split(entry, self.own.read(str(entry.key), place)) for entry in entries)
        parts = split(linear.entry, weight)
        for number, part in enumerate(linear.parts):
            product = b[number].float() @ a[number].float()
            whole = parts[part].float() + self.adapters.scale * product
            if magnitude:
                length = torch.linalg.vector_norm(whole, dim=1)
                whole = whole * (magnitude[0][number].float() / length)[:, None]
            parts[part] = whole.to(weight.dtype)
        return join(linear.entry, parts)


def open_checkpoint(
    path: str | Path, base: str | Path | None = None, *, ema: bool = False
) -> DistCheckpoint:
    """A checkpoint as a whole model; one of adapters together with its base.

    Args:
        path: checkpoint or run folder.
        base: of a checkpoint of adapters, where its base is now; None: where it was.
        ema: read the running mean of what learns in the place of its weights.

    Raises:
        CheckpointError: it is missing or unreadable, or its base is.
    """
    found = DistCheckpoint(path, ema=ema)
    if found.of_base is not None:
        return AdaptedCheckpoint(found, base)
    if base is not None:
        raise CheckpointError(f"--base {base}: {found.path} holds a whole model, no adapters")
    return found
