"""Which keys each query row of a pack sees, as ranges [low, high), and tiles of rows over them.

Everything that a pack allows is a range of consecutive rows: a text row sees the visual rows of
its sample's images so far, and the text rows from the window's edge to itself. Both ends never
fall from one row of a sample to the next. Worked out on the host, once per pack.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dattn_mcore.layers.layout import Block

QUERY_TILE_FIELDS = 10  # see `query_tiles`
KEY_TILE_FIELDS = 6  # see `key_tiles`


@dataclass(frozen=True)
class Ranges:
    """Keys [low[i], high[i]) that query row i sees; empty where low equals high.

    Attributes:
        low, high: int32 [real query rows].
        key_lengths: real key rows per sample.
    """

    low: np.ndarray
    high: np.ndarray
    key_lengths: tuple[int, ...]


def causal_ranges(lengths: Sequence[int], window: int | None) -> Ranges:
    """Each row sees the rows of its sample up to itself, the last `window` of them at most."""
    count = sum(lengths)
    row = np.arange(count, dtype=np.int32)
    low = np.repeat(_starts(lengths), lengths)
    if window is not None:
        low = np.maximum(low, row - np.int32(window - 1))
    return Ranges(low.astype(np.int32), row + 1, tuple(lengths))


def block_ranges(
    blocks: Sequence[Block], lengths: Sequence[int], key_lengths: Sequence[int]
) -> Ranges:
    """What text rows see of the visual rows; rows in no block see none.

    Args:
        blocks: `DecomposedSeqParams.blocks`.
        lengths, key_lengths: text and visual rows per sample.
    """
    # An empty range stands at the start of the sample's visual rows, so that ends never fall.
    low = np.repeat(_starts(key_lengths), lengths).astype(np.int32)
    high = low.copy()
    for block in blocks:
        low[block.text_start : block.text_stop] = block.visual_start
        high[block.text_start : block.text_stop] = block.visual_stop
    return Ranges(low, high, tuple(key_lengths))


def query_tiles(lengths: Sequence[int], rows: int, first: Ranges, second: Ranges) -> np.ndarray:
    """Tiles of at most `rows` query rows, none across samples, the costliest first.

    Returns:
        int32 [tiles, 10]: start and stop row; then for each of the two key sets the first and
        last key that any row sees, with the range that all rows see in between, as
        (low, full_low, full_high, high).
    """
    spans = _spans(lengths, rows)
    table = np.zeros((len(spans), QUERY_TILE_FIELDS), dtype=np.int32)
    work = np.zeros(len(spans), dtype=np.int64)
    for i, (start, stop) in enumerate(spans):
        table[i, :2] = start, stop
        for at, ranges in ((2, first), (6, second)):
            low, high = ranges.low[start:stop], ranges.high[start:stop]
            sees = low < high
            if sees.any():
                bottom, top = low[sees].min(), high[sees].max()
                full_low, full_high = low.max(), high.min()
                if not sees.all() or full_low >= full_high:
                    full_low = full_high = bottom
                table[i, at : at + 4] = bottom, full_low, full_high, top
                work[i] += top - bottom
    return table[np.argsort(-work, kind="stable")]


def key_tiles(lengths: Sequence[int], rows: int, ranges: Ranges) -> np.ndarray:
    """Tiles of at most `rows` keys, none across samples, the costliest first.

    Returns:
        int32 [tiles, 6]: start and stop key; first and last query row that sees any of the tile,
        with the rows that see all of it in between, as (low, full_low, full_high, high).
    """
    table = []
    offsets, key_offsets = _starts(lengths), _starts(ranges.key_lengths)
    for sample, (queries, keys) in enumerate(zip(lengths, ranges.key_lengths, strict=True)):
        begin, key_begin = int(offsets[sample]), int(key_offsets[sample])
        low = ranges.low[begin : begin + queries]
        high = ranges.high[begin : begin + queries]
        start = key_begin + np.arange(0, keys, rows)
        stop = np.minimum(start + rows, key_begin + keys)
        # Ends never fall within a sample, so each of these sets of rows is consecutive.
        some_low, some_high = np.searchsorted(high, start, "right"), np.searchsorted(low, stop)
        full_low, full_high = np.searchsorted(high, stop), np.searchsorted(low, start, "right")
        some_high = np.maximum(some_high, some_low)
        full_high = np.maximum(full_high, full_low)
        rows_of_tile = [some_low, full_low, full_high, some_high]
        table.append(np.stack([start, stop, *(begin + x for x in rows_of_tile)], axis=1))
    tiles = np.concatenate(table) if table else np.zeros((0, KEY_TILE_FIELDS))
    tiles = tiles.astype(np.int32)
    return tiles[np.argsort(tiles[:, 2] - tiles[:, 5], kind="stable")]


def _starts(lengths: Sequence[int]) -> np.ndarray:
    return np.array([0, *itertools.accumulate(lengths)][: len(lengths)], dtype=np.int64)


def _spans(lengths: Sequence[int], rows: int) -> list[tuple[int, int]]:
    spans, start = [], 0
    for length in lengths:
        stop = start + length
        spans += [(a, min(a + rows, stop)) for a in range(start, stop, rows)]
        start = stop
    return spans
