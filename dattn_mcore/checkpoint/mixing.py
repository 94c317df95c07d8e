"""Joins the Hugging Face tensors of a table's line to one of Megatron-Core, and splits it again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dattn_mcore.architectures.parameters import Entry


def join(entry: Entry, parts: Sequence[Tensor]) -> Tensor:
    """The Megatron-Core tensor (of one layer) that the Hugging Face tensors make."""
    mix = entry.mix
    if mix.kind == "stacked":
        return torch.cat(list(parts))
    if mix.kind == "interleaved":
        by_group = [part.unflatten(0, (mix.groups, -1)) for part in parts]
        return torch.cat(by_group, dim=1).flatten(0, 1)
    (tensor,) = parts
    if mix.kind == "padded" and mix.rows > len(tensor):
        padding = tensor.new_zeros(mix.rows - len(tensor), *tensor.shape[1:])
        return torch.cat([tensor, padding])
    return tensor


def split(entry: Entry, tensor: Tensor) -> list[Tensor]:
    """The Hugging Face tensors of a Megatron-Core tensor: the inverse of `join`, bit for bit."""
    mix, rows = entry.mix, [shape[0] for shape in entry.parts.values()]
    if mix.kind == "stacked":
        return list(tensor.split(rows))
    if mix.kind == "interleaved":
        by_group = tensor.unflatten(0, (mix.groups, -1))
        pieces = by_group.split([count // mix.groups for count in rows], dim=1)
        return [piece.flatten(0, 1) for piece in pieces]
    return [tensor[: rows[0]]] if mix.kind == "padded" else [tensor]
