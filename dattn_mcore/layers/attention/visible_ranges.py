"""Which keys each query row of a pack sees, as ranges [low, high), and tiles of rows over them.

A text row sees the text rows of its sample from the window's edge to itself: one range. Of the
visual rows it sees those of its blocks, which may be anywhere: one range for each block, in a slot
of its own. Seen from the keys, a tile of text keys has one interval of rows that see it; a tile of
visual keys has a list of them, as several samples may see the same images. Worked out on the host,
once per pack.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dattn_mcore.layers.blocks import Block

QUERY_TILE_FIELDS = 6  # see `query_tiles`; and
SLOT_FIELDS = 4  # for each slot of the visual ranges
KEY_TILE_FIELDS = 4  # see `KeyTiles`
INTERVAL_FIELDS = 5


@dataclass(frozen=True)
class Ranges:
    """Keys that query rows see: row i those of [low[s, i], high[s, i]) of every slot s.

    Attributes:
        low, high: int32 [slots, real query rows]; a slot is empty where both are equal. No key is
            in two slots of a row.
    """

    low: np.ndarray
    high: np.ndarray

    @property
    def most(self) -> int:
        """Keys of the row that sees most."""
        return int((self.high - self.low).sum(0).max(initial=0))


@dataclass(frozen=True)
class Pieces:
    """Blocks as arrays; those of one run of text have a slot each.

    Attributes:
        slot: int64 [pieces], number of the piece among those of its text rows.
        text_start, text_stop, visual_start, visual_stop: int64 [pieces]; not empty.
    """

    slot: np.ndarray
    text_start: np.ndarray
    text_stop: np.ndarray
    visual_start: np.ndarray
    visual_stop: np.ndarray


@dataclass(frozen=True)
class KeyTiles:
    """Tiles of keys, the costliest first, each with the query rows that see it.

    Attributes:
        tiles: int32 [tiles, 4]: start and stop key, its first interval, and how many it has (one at
            least, which may be empty).
        intervals: int32 [intervals, 5]: the line of `Schedule.bounds` with these rows' lower ends;
            first and last query row that sees any of the tile, with rows that see all of it in
            between, as (low, full_low, full_high, high).
        most: query rows of the tile that most rows see.
    """

    tiles: np.ndarray
    intervals: np.ndarray
    most: int


def causal_ranges(lengths: Sequence[int], window: int | None) -> Ranges:
    """Each row sees the rows of its sample up to itself, the last `window` of them at most."""
    count = sum(lengths)
    row = np.arange(count, dtype=np.int32)
    low = np.repeat(_starts(lengths), lengths)
    if window is not None:
        low = np.maximum(low, row - np.int32(window - 1))
    return Ranges(low.astype(np.int32)[None], row[None] + 1)


def pieces_of(blocks: Sequence[Block]) -> Pieces:
    """What text rows see of the visual rows; a run's blocks that adjoin are one piece.

    Args:
        blocks: `DecomposedSeqParams.blocks`.
    """
    rows: list[list[int]] = []
    ordered = sorted(blocks, key=lambda b: (b.text_start, b.text_stop, b.visual_start))
    for block in ordered:
        if block.text_start == block.text_stop or block.visual_start == block.visual_stop:
            continue
        text = [block.text_start, block.text_stop]
        same_run = bool(rows) and rows[-1][1:3] == text
        if same_run and rows[-1][4] == block.visual_start:
            rows[-1][4] = block.visual_stop
            continue
        slot = rows[-1][0] + 1 if same_run else 0
        rows.append([slot, *text, block.visual_start, block.visual_stop])
    slot, text_start, text_stop, visual_start, visual_stop = (
        np.array(rows, dtype=np.int64).reshape(-1, 5).T
    )
    return Pieces(
        slot=slot,
        text_start=text_start,
        text_stop=text_stop,
        visual_start=visual_start,
        visual_stop=visual_stop,
    )


def block_ranges(pieces: Pieces, rows: int) -> Ranges:
    """Ranges of `rows` text rows; rows in no piece see nothing."""
    low = np.zeros((int(pieces.slot.max(initial=0)) + 1, rows), dtype=np.int32)
    high = low.copy()
    count = pieces.text_stop - pieces.text_start
    at = np.repeat(pieces.slot, count), _counted(pieces.text_start, count)
    low[at], high[at] = np.repeat(pieces.visual_start, count), np.repeat(pieces.visual_stop, count)
    return Ranges(low, high)


def query_tiles(lengths: Sequence[int], rows: int, text: Ranges, visual: Ranges) -> np.ndarray:
    """Tiles of at most `rows` query rows, none across samples, the costliest first.

    Returns:
        int32 [tiles, 6 + 4 * slots]: start and stop row; then for the text keys and for each slot
        of the visual keys the first and last key that any row sees, with the range that all rows
        see in between, as (low, full_low, full_high, high).
    """
    start, stop = _spans(lengths, rows)
    slots = [(text.low[0], text.high[0]), *zip(visual.low, visual.high, strict=True)]
    table = np.zeros((len(start), 2 + SLOT_FIELDS * len(slots)), dtype=np.int32)
    table[:, 0], table[:, 1] = start, stop
    work = np.zeros(len(start), dtype=np.int64)
    if len(start):
        for index, (low, high) in enumerate(slots):
            bounds = _tile_bounds(low.astype(np.int64), high.astype(np.int64), start)
            table[:, 2 + SLOT_FIELDS * index :][:, :SLOT_FIELDS] = bounds
            work += bounds[:, 3] - bounds[:, 0]
    return table[np.argsort(-work, kind="stable")]


def _tile_bounds(low: np.ndarray, high: np.ndarray, start: np.ndarray) -> np.ndarray:
    """(low, full_low, full_high, high) of the tiles that begin at these rows; zeros for no key."""
    sees = low < high
    any_sees = np.logical_or.reduceat(sees, start)
    bottom = np.minimum.reduceat(np.where(sees, low, np.iinfo(np.int64).max), start)
    top = np.maximum.reduceat(np.where(sees, high, -1), start)
    full_low, full_high = np.maximum.reduceat(low, start), np.minimum.reduceat(high, start)
    no_full = ~np.logical_and.reduceat(sees, start) | (full_low >= full_high)
    full_low, full_high = np.where(no_full, bottom, [full_low, full_high])
    return np.where(any_sees, [bottom, full_low, full_high, top], 0).T


def causal_key_tiles(lengths: Sequence[int], window: int | None, rows: int) -> KeyTiles:
    """Tiles of at most `rows` text keys, none across samples; one interval each."""
    start, stop = _spans(lengths, rows)
    ends = np.cumsum(np.array(lengths, dtype=np.int64))
    end = ends[np.searchsorted(ends, start, "right")]
    high, full_low, full_high = end, stop - 1, end
    if window is not None:
        high = np.minimum(end, stop - 1 + window)
        full_high = np.maximum(np.minimum(end, start + window), full_low)
    intervals = np.stack([np.zeros_like(start), start, full_low, full_high, high], axis=1)
    return _key_tiles(start, stop, np.arange(len(start)), intervals)


def block_key_tiles(pieces: Pieces, rows: int) -> KeyTiles:
    """Tiles of at most `rows` visual keys, up to the last that is seen."""
    start, stop = _cut(pieces, rows)
    # Every piece with every tile of which it sees a key, by tile, slot and text rows.
    first = np.searchsorted(stop, pieces.visual_start, "right")
    count = np.searchsorted(start, pieces.visual_stop, "left") - first
    piece, tile = np.repeat(np.arange(len(count)), count), _counted(first, count)
    order = np.lexsort((pieces.text_start[piece], pieces.slot[piece], tile))
    piece, tile = piece[order], tile[order]
    slot, low, high = pieces.slot[piece], pieces.text_start[piece], pieces.text_stop[piece]
    full = pieces.visual_start[piece] <= start[tile]
    full &= pieces.visual_stop[piece] >= stop[tile]
    # Neighbours that go on are one interval; within it, those that see alike are one run.
    goes_on = (tile[1:] == tile[:-1]) & (slot[1:] == slot[:-1]) & (low[1:] == high[:-1])
    begins = np.flatnonzero(np.append(True, ~goes_on)[: len(tile)])
    ends = np.append(begins[1:], len(tile))[: len(begins)] - 1
    table = np.stack([2 + 2 * slot[begins], low[begins], low[begins], low[begins], high[ends]], 1)
    _fill_full(table, begins, goes_on & (full[1:] == full[:-1]), low, high, full)
    return _key_tiles(start, stop, tile[begins], table)


def _fill_full(
    table: np.ndarray,
    begins: np.ndarray,
    alike: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    full: np.ndarray,
) -> None:
    """Fills in full_low and full_high: the longest run of rows that see all of the tile.

    Args:
        table: [intervals, 5], filled.
        begins: the first piece of each interval.
        alike: bool [pieces - 1], whether the next piece is of the same run.
        low, high, full: rows of each piece, and whether they see all.
    """
    first = np.flatnonzero(np.append(True, ~alike)[: len(full)])
    last = np.append(first[1:], len(full))[: len(first)] - 1
    low, high = low[first], high[last]
    interval = np.searchsorted(begins, first, "right") - 1
    order = np.lexsort((low - high, interval))
    order = order[full[first[order]]]
    chosen, at = np.unique(interval[order], return_index=True)
    table[chosen, 2], table[chosen, 3] = low[order[at]], high[order[at]]


def _cut(pieces: Pieces, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends of tiles of visual rows, none of which reaches into other images.

    Visual rows of pieces that overlap are one stretch; what lies between stretches is seen by
    nobody, and is cut as well.
    """
    order = np.argsort(pieces.visual_start, kind="stable")
    start = pieces.visual_start[order]
    reach = np.maximum.accumulate(pieces.visual_stop[order])
    is_new = np.append(True, start[1:] >= reach[:-1])[: len(start)]
    ends = reach[np.append(is_new[1:], True)[: len(start)]]
    edges = np.unique(np.concatenate([[0], start[is_new], ends]))
    return _spans(np.diff(edges), rows)


def _key_tiles(
    start: np.ndarray, stop: np.ndarray, tile: np.ndarray, intervals: np.ndarray
) -> KeyTiles:
    """Tiles from their ends and intervals; `tile` says whose each interval is, and never falls."""
    count = np.bincount(tile, minlength=len(start))
    first = np.cumsum(count) - count
    work = np.zeros(len(start), dtype=np.int64)
    np.add.at(work, tile, intervals[:, 4] - intervals[:, 1])
    first[count == 0] = len(intervals)  # nobody sees it: an empty one
    intervals = np.append(intervals, np.zeros((1, INTERVAL_FIELDS), dtype=np.int64), axis=0)
    tiles = np.stack([start, stop, first, np.maximum(count, 1)], axis=1)
    tiles = tiles[np.argsort(-work, kind="stable")]
    most = int(work.max(initial=0))
    return KeyTiles(tiles.astype(np.int32), intervals.astype(np.int32), most)


def _counted(start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """start[0], start[0] + 1, ... (count[0] of them), then the same from start[1], and so on."""
    return np.arange(count.sum()) + np.repeat(start - (np.cumsum(count) - count), count)


def _starts(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    return np.array([0, *itertools.accumulate(lengths)][: len(lengths)], dtype=np.int64)


def _spans(lengths: Sequence[int] | np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """First row and end of the pieces of at most `rows` rows into which samples are cut."""
    lengths = np.array(lengths, dtype=np.int64)
    count = -(-lengths // rows)
    begin = np.cumsum(lengths) - lengths
    stop = np.repeat(begin + lengths, count)
    piece = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    start = np.repeat(begin, count) + rows * piece
    return start, np.minimum(start + rows, stop)
