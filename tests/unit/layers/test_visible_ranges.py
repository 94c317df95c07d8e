"""The kernels' tile tables: those of a plain loop over samples, without the loop."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dattn_mcore.layers.attention.visible_ranges import (
    KEY_TILE_FIELDS,
    QUERY_TILE_FIELDS,
    Ranges,
    block_ranges,
    causal_ranges,
    key_tiles,
    query_tiles,
)
from dattn_mcore.layers.layout import build_seq_params
from tests.counted_lines import lines_of


def plain_query_tiles(lengths, rows, first, second):
    """Tiles of at most `rows` query rows, none across samples, the costliest first.

    Returns:
        int32 [tiles, 10]: start and stop row; then for each of the two key sets the first and
        last key that any row sees, with the range that all rows see in between, as
        (low, full_low, full_high, high).
    """
    spans = spans_of(lengths, rows)
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


def plain_key_tiles(lengths, rows, ranges):
    """Tiles of at most `rows` keys, none across samples, the costliest first.

    Returns:
        int32 [tiles, 6]: start and stop key; first and last query row that sees any of the tile,
        with the rows that see all of it in between, as (low, full_low, full_high, high).
    """
    table = []
    offsets, key_offsets = starts_of(lengths), starts_of(ranges.key_lengths)
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


def starts_of(lengths):
    return np.array([0, *itertools.accumulate(lengths)][: len(lengths)], dtype=np.int64)


def spans_of(lengths, rows):
    spans, start = [], 0
    for length in lengths:
        stop = start + length
        spans += [(a, min(a + rows, stop)) for a in range(start, stop, rows)]
        start = stop
    return spans


def ranges_of(layouts, window):
    params = build_seq_params(layouts, t2v_position="none")
    visual = block_ranges(params.blocks, params.text_lengths, params.visual_lengths)
    return params.text_lengths, visual, causal_ranges(params.text_lengths, window)


runs = st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=8)


@settings(max_examples=300, deadline=None)
@given(
    samples=st.lists(runs, max_size=8),
    rows=st.sampled_from([1, 4, 16, 64]),
    window=st.sampled_from([None, 1, 7]),
)
def test_tiles_are_those_of_a_loop_over_samples(samples, rows, window):
    lengths, visual, causal = ranges_of(samples, window)
    nothing = Ranges(causal.low, causal.low, (0,) * len(lengths))
    for first, second in ((visual, causal), (nothing, causal)):
        tiles = query_tiles(lengths, rows, first, second)
        np.testing.assert_array_equal(tiles, plain_query_tiles(lengths, rows, first, second))
        assert tiles.dtype == np.int32 and tiles.shape[1] == QUERY_TILE_FIELDS
    for ranges in (visual, causal, nothing):
        tiles = key_tiles(lengths, rows, ranges)
        np.testing.assert_array_equal(tiles, plain_key_tiles(lengths, rows, ranges))
        assert tiles.dtype == np.int32 and tiles.shape[1] == KEY_TILE_FIELDS


@pytest.mark.parametrize("samples", [1, 3000])
def test_python_work_does_not_grow_with_samples(samples):
    """Lines run, not seconds. A loop over samples runs three lines and more for each."""
    layouts = (((False, 2), (True, 9), (False, 20)),) * samples
    lengths, visual, causal = ranges_of(layouts, None)
    with lines_of("layers/attention/visible_ranges.py") as counted:
        query_tiles(lengths, 16, visual, causal)
        key_tiles(lengths, 16, visual)
    assert 0 < counted.lines < 100
