"""Which rows of a pack form one call of PyTorch's dense kernels.

Text rows go causally, padded to the longest of a bucket. Text by visual rows go as rectangles
(`rows.passes_over_images`) in batches of equal numbers of visual rows, their text padded to the
longest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dattn_mcore.layers.attention.modes import InChunks
from dattn_mcore.layers.attention.rows import (
    Rectangle,
    Rows,
    k_rows_of,
    passes_over_images,
    q_rows_of,
)
from dattn_mcore.layers.blocks import Block


@dataclass(frozen=True)
class Batch:
    """Rows of one kernel call.

    Attributes:
        size: entries of the batch.
        queries: rows of the longest entry; the others are padded to it.
        q_rows, k_rows: rows of the pack, entry after entry, without padding. Keys need none.
        slots: int64 [real queries], their places among size * queries; None: nothing is padded.
    """

    size: int
    queries: int
    q_rows: Rows
    k_rows: Rows
    slots: torch.Tensor | None

    def padded(self, rows: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        """[real queries, ...] -> [size, queries, ...]."""
        if self.slots is None:
            return rows.unflatten(0, (self.size, self.queries))
        whole = rows.new_full((self.size * self.queries, *rows.shape[1:]), fill)
        return whole.index_copy_(0, self.slots, rows).unflatten(0, (self.size, self.queries))

    def unpadded(self, rows: torch.Tensor) -> torch.Tensor:
        """[size, queries, ...] -> [real queries, ...]."""
        rows = rows.flatten(0, 1)
        return rows if self.slots is None else rows[self.slots]


def _make_batch(rectangles: Sequence[Rectangle], device: torch.device) -> Batch:
    lengths = np.array([one.queries for one in rectangles])
    longest = int(lengths.max())
    slots = None
    if (lengths < longest).any():
        real = np.arange(longest) < lengths[:, None]
        slots = torch.from_numpy(np.flatnonzero(real)).to(device)
    return Batch(
        size=len(rectangles),
        queries=longest,
        q_rows=q_rows_of(rectangles, device),
        k_rows=k_rows_of(rectangles, device),
        slots=slots,
    )


def causal_batches(samples: Sequence[Rectangle], device: torch.device) -> list[Batch]:
    """Samples bucketed by length (powers of two from 16): few calls, and little padding.

    Args:
        samples: of each the rows that ask, and as many that answer.
        device: where index tensors live.
    """
    buckets: dict[int, list[Rectangle]] = defaultdict(list)
    for one in samples:
        buckets[max(16, 1 << (one.keys - 1).bit_length())].append(one)
    return [_make_batch(rectangles, device) for rectangles in buckets.values()]


def cut_chunks(sees: InChunks) -> tuple[tuple[Block, ...], list[Rectangle]]:
    """What chunks see, as blocks of keys before their own rows, and their own rows, causally.

    A window that ends within the former gives each row a block of its own.
    """
    own, before = [], []
    for chunk in sees.chunks:
        first = chunk.k_stop - chunk.rows
        own.append(Rectangle(((chunk.q_start, chunk.q_stop),), (first, chunk.k_stop)))
        if sees.window is None or chunk.k_stop - chunk.k_start <= sees.window:
            before.append(Block(chunk.q_start, chunk.q_stop, chunk.k_start, first))
            continue
        for row, block in enumerate(InChunks((chunk,), sees.window).blocks()):
            start, stop = block.visual_start, min(block.visual_stop, first)
            if start < stop:
                before.append(Block(chunk.q_start + row, chunk.q_start + row + 1, start, stop))
    return tuple(block for block in before if block.visual_start < block.visual_stop), own


def block_batches(blocks: Sequence[Block], device: torch.device) -> list[list[Batch]]:
    """Text by visual rows: passes of batches; those of a pass have no rows in common."""
    return [
        [_make_batch(batch, device) for batch in batches]
        for rectangles in passes_over_images(blocks)
        for batches in _batched(rectangles)
    ]


def _batched(rectangles: Sequence[Rectangle]) -> list[list[list[Rectangle]]]:
    """Passes of batches for rectangles that have no rows in common.

    One call takes rectangles with equal numbers of visual rows. Where these differ so much that
    it would be many calls, visual rows are cut into powers of two, at most one of each from a
    rectangle: then the calls are bounded by the logarithms of the rows.
    """
    whole = _by_keys(rectangles)
    pieces: dict[int, list[Rectangle]] = defaultdict(list)
    for one in rectangles:
        start = one.k_span[0]
        for bit in reversed(range(one.keys.bit_length())):
            if one.keys >> bit & 1:
                stop = start + (1 << bit)
                pieces[bit].append(Rectangle(one.q_spans, (start, stop)))
                start = stop
    cut = [_of_like_length(found) for _, found in sorted(pieces.items(), reverse=True)]
    return cut if sum(map(len, cut)) < len(whole) else [whole]


def _by_keys(rectangles: Sequence[Rectangle]) -> list[list[Rectangle]]:
    """Batches of equal numbers of visual rows and of text rows that are alike."""
    groups: dict[int, list[Rectangle]] = defaultdict(list)
    for one in rectangles:
        groups[one.keys].append(one)
    return [batch for found in groups.values() for batch in _of_like_length(found)]


def _of_like_length(rectangles: Sequence[Rectangle]) -> list[list[Rectangle]]:
    """Batches in which padding at most doubles the text rows.

    From the longest down, a batch takes what keeps that. The first that it does not take has less
    than half of its longest's rows, so n rows make at most 1 + log2(n) batches.
    """
    batches: list[list[Rectangle]] = []
    real = 0
    for one in sorted(rectangles, key=lambda found: found.queries, reverse=True):
        rows = one.queries
        if not batches or (len(batches[-1]) + 1) * batches[-1][0].queries > 2 * (real + rows):
            batches.append([])
            real = 0
        batches[-1].append(one)
        real += rows
    return [sorted(batch, key=lambda one: one.q_spans) for batch in batches]
