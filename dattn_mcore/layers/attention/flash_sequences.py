"""Which rows of a pack form the sequences of one varlen call of flash-attn."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dattn_mcore.layers.attention.modes import Causal, InBlocks, InChunks
from dattn_mcore.layers.attention.rows import (
    Rectangle,
    Rows,
    k_rows_of,
    passes_over_images,
    q_rows_of,
    sample_rectangles,
)


@dataclass(frozen=True)
class Sequences:
    """Sequences of one varlen call.

    Attributes:
        q_rows, k_rows: rows of the pack, one sequence after the other.
        cu_q, cu_k: int32 [sequences + 1], starts of the sequences and the end of the last.
        max_q, max_k: rows of the longest.
        causal: the last query row sees all keys, each before one less; else all rows see all.
    """

    q_rows: Rows
    k_rows: Rows
    cu_q: torch.Tensor
    cu_k: torch.Tensor
    max_q: int
    max_k: int
    causal: bool


def make_sequences(
    rectangles: Sequence[Rectangle], *, causal: bool, device: torch.device
) -> Sequences:
    """One sequence for each rectangle."""
    queries, keys = [one.queries for one in rectangles], [one.keys for one in rectangles]

    def starts(lengths: Sequence[int]) -> torch.Tensor:
        ends = [0, *itertools.accumulate(lengths)]
        return torch.tensor(ends, dtype=torch.int32, device=device)

    return Sequences(
        q_rows=q_rows_of(rectangles, device),
        k_rows=k_rows_of(rectangles, device),
        cu_q=starts(queries),
        cu_k=starts(keys),
        max_q=max(queries, default=0),
        max_k=max(keys, default=0),
        causal=causal,
    )


def sequence_passes(sees: Causal | InBlocks | InChunks) -> list[list[Rectangle]]:
    """Passes of rows and keys; those of a pass have none in common."""
    if isinstance(sees, InBlocks):
        return passes_over_images(sees.blocks)
    if isinstance(sees, Causal):
        samples = sample_rectangles(sees.lengths)
        return [samples] if samples else []
    # The chunks of a sample all see its beginning.
    passes: list[list[Rectangle]] = []
    number: Counter[int] = Counter()
    for chunk in sees.chunks:
        if number[chunk.k_start] == len(passes):
            passes.append([])
        passes[number[chunk.k_start]].append(
            Rectangle(((chunk.q_start, chunk.q_stop),), (chunk.k_start, chunk.k_stop))
        )
        number[chunk.k_start] += 1
    return passes
