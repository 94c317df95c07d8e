"""Gradients of a vision tower whose tensor parallel ranks each compute tiles of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch.distributed as dist

from dattn_mcore.models.dattn import DattnModel


def sum_gradients(chunks: Iterable[DattnModel]) -> None:
    """Adds up the gradients of different tiles over the tensor parallel group, in DDP's buffers.

    Called by every rank once a step, when gradients have been reduced over data and context
    parallel ranks. One after the other in place: in one piece they would take their memory again.
    """
    for chunk in chunks:
        if chunk.tower_is_replicated:
            for parameter in _visual_parameters(chunk):
                dist.all_reduce(parameter.main_grad, group=chunk.tp_group)


def _visual_parameters(chunk: DattnModel) -> Iterator[Any]:
    for part in (chunk.vision, chunk.projector):
        yield from (parameter for parameter in part.parameters() if parameter.requires_grad)
