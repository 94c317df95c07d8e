"""Which keys each query row of a pack sees, as ranges [low, high), and tiles of rows over them.

Everything that a pack allows is a range of consecutive rows: a text row sees the visual rows of
its sample's images so far, and the text rows from the window's edge to itself. Both ends never
fall from one row to the next, nor from one sample to the next. Worked out on the host, once per
pack.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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
    start, stop = _spans(lengths, rows)
    table = np.zeros((len(start), QUERY_TILE_FIELDS), dtype=np.int32)
    table[:, 0], table[:, 1] = start, stop
    work = np.zeros(len(start), dtype=np.int64)
    if len(start):
        for at, ranges in ((2, first), (6, second)):
            table[:, at : at + 4] = bounds = _tile_bounds(ranges, start)
            work += bounds[:, 3] - bounds[:, 0]
    return table[np.argsort(-work, kind="stable")]


def _tile_bounds(ranges: Ranges, start: np.ndarray) -> np.ndarray:
    """(low, full_low, full_high, high) of the tiles that begin at these rows; zeros for no key."""
    low, high = ranges.low.astype(np.int64), ranges.high.astype(np.int64)
    sees = low < high
    any_sees = np.logical_or.reduceat(sees, start)
    bottom = np.minimum.reduceat(np.where(sees, low, np.iinfo(np.int64).max), start)
    top = np.maximum.reduceat(np.where(sees, high, -1), start)
    full_low, full_high = np.maximum.reduceat(low, start), np.minimum.reduceat(high, start)
    no_full = ~np.logical_and.reduceat(sees, start) | (full_low >= full_high)
    full_low, full_high = np.where(no_full, bottom, [full_low, full_high])
    return np.where(any_sees, [bottom, full_low, full_high, top], 0).T


def key_tiles(lengths: Sequence[int], rows: int, ranges: Ranges) -> np.ndarray:
    """Tiles of at most `rows` keys, none across samples, the costliest first.

    Returns:
        int32 [tiles, 6]: start and stop key; first and last query row that sees any of the tile,
        with the rows that see all of it in between, as (low, full_low, full_high, high).
    """
    start, stop = _spans(ranges.key_lengths, rows)
    offsets, key_offsets = _starts(lengths), _starts(ranges.key_lengths)
    # A sample without keys has the next one's offset: the last of equal ones has the tile.
    sample = np.searchsorted(key_offsets, start, "right") - 1
    begin, end = offsets[sample], offsets[sample] + np.array(lengths, dtype=np.int64)[sample]

    def row(ends: np.ndarray, key: np.ndarray, side: Literal["left", "right"]) -> np.ndarray:
        # Ends never fall from row to row, so each of these sets of rows is consecutive.
        return np.clip(np.searchsorted(ends, key, side), begin, end)

    some_low, some_high = row(ranges.high, start, "right"), row(ranges.low, stop, "left")
    full_low, full_high = row(ranges.high, stop, "left"), row(ranges.low, start, "right")
    some_high = np.maximum(some_high, some_low)
    full_high = np.maximum(full_high, full_low)
    tiles = np.stack([start, stop, some_low, full_low, full_high, some_high], axis=1)
    return tiles[np.argsort(tiles[:, 2] - tiles[:, 5], kind="stable")].astype(np.int32)


def _starts(lengths: Sequence[int]) -> np.ndarray:
    return np.array([0, *itertools.accumulate(lengths)][: len(lengths)], dtype=np.int64)


def _spans(lengths: Sequence[int], rows: int) -> tuple[np.ndarray, np.ndarray]:
    """First row and end of the pieces of at most `rows` rows into which samples are cut."""
    count = -(-np.array(lengths, dtype=np.int64) // rows)
    begin = _starts(lengths)
    stop = np.repeat(begin + np.array(lengths, dtype=np.int64), count)
    piece = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    start = np.repeat(begin, count) + rows * piece
    return start, np.minimum(start + rows, stop)
