"""Which rows of a pack form one call of PyTorch's dense kernels.

Text rows go causally, padded to the longest of a bucket. Text by visual rows go as rectangles
(`rows.passes_over_images`) in batches of equal numbers of visual rows, their text padded to the
longest. Index tensors are kept with the pack.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dattn_mcore.layers.attention.rows import Rows, passes_over_images, rows_of
from dattn_mcore.layers.layout import Block, DecomposedSeqParams


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


def _make_batch(blocks: Sequence[Block], device: torch.device) -> Batch:
    spans = [(block.text_start, block.text_stop) for block in blocks]
    lengths = np.array([stop - start for start, stop in spans])
    longest = int(lengths.max())
    slots = None
    if (lengths < longest).any():
        real = np.arange(longest) < lengths[:, None]
        slots = torch.from_numpy(np.flatnonzero(real)).to(device)
    return Batch(
        size=len(blocks),
        queries=longest,
        q_rows=rows_of(spans, device),
        k_rows=rows_of([(block.visual_start, block.visual_stop) for block in blocks], device),
        slots=slots,
    )


def causal_batches(
    params: DecomposedSeqParams, name: str, lengths: tuple[int, ...], device: torch.device
) -> list[Batch]:
    """Samples bucketed by length (powers of two from 16): few calls, and little padding."""
    if name not in params.cache:
        buckets: dict[int, list[Block]] = defaultdict(list)
        for stop, length in zip(itertools.accumulate(lengths), lengths, strict=True):
            if length:
                start = stop - length
                bucket = max(16, 1 << (length - 1).bit_length())
                buckets[bucket].append(Block(start, stop, start, stop))
        params.cache[name] = [_make_batch(blocks, device) for blocks in buckets.values()]
    return params.cache[name]


def block_batches(params: DecomposedSeqParams, device: torch.device) -> list[list[Batch]]:
    """Text by visual rows: passes of batches; those of a pass have no rows in common."""
    if "blocks" not in params.cache:
        params.cache["blocks"] = [
            [_make_batch(blocks, device) for blocks in batches]
            for rectangles in passes_over_images(params.blocks)
            for batches in _batched(rectangles)
        ]
    return params.cache["blocks"]


def _batched(rectangles: Sequence[Block]) -> list[list[list[Block]]]:
    """Passes of batches for rectangles that have no rows in common.

    One call takes rectangles with equal numbers of visual rows. Where these differ so much that
    it would be many calls, visual rows are cut into powers of two, at most one of each from a
    rectangle: then the calls are bounded by the logarithms of the rows.
    """
    whole = _by_keys(rectangles)
    pieces: dict[int, list[Block]] = defaultdict(list)
    for block in rectangles:
        start = block.visual_start
        rows = block.visual_stop - start
        for bit in reversed(range(rows.bit_length())):
            if rows >> bit & 1:
                stop = start + (1 << bit)
                pieces[bit].append(Block(block.text_start, block.text_stop, start, stop))
                start = stop
    cut = [_of_like_length(blocks) for _, blocks in sorted(pieces.items(), reverse=True)]
    return cut if sum(map(len, cut)) < len(whole) else [whole]


def _by_keys(rectangles: Sequence[Block]) -> list[list[Block]]:
    """Batches of equal numbers of visual rows and of text rows that are alike."""
    groups: dict[int, list[Block]] = defaultdict(list)
    for block in rectangles:
        groups[block.visual_stop - block.visual_start].append(block)
    return [batch for blocks in groups.values() for batch in _of_like_length(blocks)]


def _of_like_length(blocks: Sequence[Block]) -> list[list[Block]]:
    """Batches in which padding at most doubles the text rows.

    From the longest down, a batch takes what keeps that. The first that it does not take has less
    than half of its longest's rows, so n rows make at most 1 + log2(n) batches.
    """

    def rows(block: Block) -> int:
        return block.text_stop - block.text_start

    batches: list[list[Block]] = []
    real = 0
    for block in sorted(blocks, key=rows, reverse=True):
        if not batches or (len(batches[-1]) + 1) * rows(batches[-1][0]) > 2 * (real + rows(block)):
            batches.append([])
            real = 0
        batches[-1].append(block)
        real += rows(block)
    return [sorted(batch, key=lambda block: block.text_start) for batch in batches]
