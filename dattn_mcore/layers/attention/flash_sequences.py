"""Which rows of a pack form the sequences of one varlen call of flash-attn."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dattn_mcore.layers.attention.rows import Rows, rows_of


@dataclass(frozen=True)
class Sequences:
    """Sequences of one varlen call.

    Attributes:
        q_rows, k_rows: rows of the pack, one sequence after the other.
        cu_q, cu_k: int32 [sequences + 1], starts of the sequences and the end of the last.
        max_q, max_k: rows of the longest.
        causal: whether queries are the keys' own rows.
    """

    q_rows: Rows
    k_rows: Rows
    cu_q: torch.Tensor
    cu_k: torch.Tensor
    max_q: int
    max_k: int
    causal: bool


def make_sequences(
    q_spans: Sequence[tuple[int, int]],
    k_spans: Sequence[tuple[int, int]],
    causal: bool,
    device: torch.device,
) -> Sequences:
    """Sequences from (start, stop) spans of queries and of the keys that they see."""

    def lengths(spans: Sequence[tuple[int, int]]) -> list[int]:
        return [stop - start for start, stop in spans]

    def starts(spans: Sequence[tuple[int, int]]) -> torch.Tensor:
        ends = [0, *itertools.accumulate(lengths(spans))]
        return torch.tensor(ends, dtype=torch.int32, device=device)

    return Sequences(
        q_rows=rows_of(q_spans, device),
        k_rows=rows_of(k_spans, device),
        cu_q=starts(q_spans),
        cu_k=starts(k_spans),
        max_q=max(lengths(q_spans), default=0),
        max_k=max(lengths(k_spans), default=0),
        causal=causal,
    )
