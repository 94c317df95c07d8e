"""The kernels' tile tables: those of plain loops, without the loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dattn_mcore.layers.attention.visible_ranges import (
    INTERVAL_FIELDS,
    KEY_TILE_FIELDS,
    block_key_tiles,
    block_ranges,
    causal_key_tiles,
    causal_ranges,
    pieces_of,
    query_tiles,
)
from dattn_mcore.layers.layout import build_seq_params
from tests.counted_lines import lines_of
from tests.unit.layers import drawn_blocks


def plain_query_tiles(lengths, rows, text, visual):
    """As `query_tiles`, one tile after the other."""
    spans = spans_of(lengths, rows)
    slots = [(text.low[0], text.high[0]), *zip(visual.low, visual.high, strict=True)]
    table = np.zeros((len(spans), 2 + 4 * len(slots)), dtype=np.int32)
    work = np.zeros(len(spans), dtype=np.int64)
    for i, (start, stop) in enumerate(spans):
        table[i, :2] = start, stop
        for index, (all_low, all_high) in enumerate(slots):
            low, high = all_low[start:stop], all_high[start:stop]
            sees = low < high
            if sees.any():
                bottom, top = low[sees].min(), high[sees].max()
                full_low, full_high = low.max(), high.min()
                if not sees.all() or full_low >= full_high:
                    full_low = full_high = bottom
                table[i, 2 + 4 * index : 6 + 4 * index] = bottom, full_low, full_high, top
                work[i] += top - bottom
    return table[np.argsort(-work, kind="stable")]


def spans_of(lengths, rows):
    spans, start = [], 0
    for length in lengths:
        stop = start + length
        spans += [(a, min(a + rows, stop)) for a in range(start, stop, rows)]
        start = stop
    return spans


def visible(ranges, keys):
    """bool [slots, rows, keys]."""
    key = np.arange(keys)
    return (ranges.low[..., None] <= key) & (key < ranges.high[..., None])


def check_key_tiles(made, ranges, keys, rows, first_line):
    """Every visible pair in one interval; none that nobody sees at the ends; full rows see all."""
    assert made.tiles.dtype == made.intervals.dtype == np.int32
    assert made.tiles.shape[1] == KEY_TILE_FIELDS
    assert made.intervals.shape[1] == INTERVAL_FIELDS
    sees = visible(ranges, keys)
    found = np.zeros_like(sees, dtype=int)
    covered, work = [], []
    for start, stop, first, count in made.tiles.tolist():
        assert 0 < stop - start <= rows and count >= 1
        covered += range(start, stop)
        work.append(0)
        for line, low, full_low, full_high, high in made.intervals[first : first + count].tolist():
            if low == high:
                assert count == 1
                continue
            slot = (line - first_line) // 2
            here = sees[slot, :, start:stop]
            assert low <= full_low <= full_high <= high
            assert here[low].any() and here[high - 1].any()
            assert here[full_low:full_high].all()
            found[slot, low:high, start:stop] += here[low:high]
            work[-1] += high - low
    assert sorted(covered) == list(range(len(covered)))
    assert not sees[..., len(covered) :].any()
    assert work == sorted(work, reverse=True) and made.most == max(work, default=0)
    np.testing.assert_array_equal(found, sees)


samples = st.lists(
    st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=8).map(tuple), max_size=8
)
tile_rows = st.sampled_from([1, 4, 16, 64])
windows = st.sampled_from([None, 1, 7])


@settings(max_examples=200, deadline=None)
@given(layouts=samples, rows=tile_rows, window=windows)
def test_tiles_of_ordinary_packs(layouts, rows, window):
    params = build_seq_params(layouts, t2v_position="none")
    lengths, pieces = params.text_lengths, pieces_of(params.blocks)
    text, visual = causal_ranges(lengths, window), block_ranges(pieces, sum(lengths))
    assert len(visual.low) == 1
    tiles = query_tiles(lengths, rows, text, visual)
    np.testing.assert_array_equal(tiles, plain_query_tiles(lengths, rows, text, visual))
    assert tiles.dtype == np.int32
    check_key_tiles(causal_key_tiles(lengths, window, rows), text, sum(lengths), rows, 0)
    over_visual = block_key_tiles(pieces, rows)
    check_key_tiles(over_visual, visual, params.num_visual, rows, 2)
    assert (over_visual.tiles[:, 3] == 1).all()  # the kernel then needs no loop over intervals


@settings(max_examples=200, deadline=None)
@given(drawn=drawn_blocks.runs, rows=tile_rows)
def test_tiles_of_any_blocks(drawn, rows):
    blocks, text = drawn_blocks.blocks_of(drawn)
    pieces, causal = pieces_of(blocks), causal_ranges((text,), None)
    ranges = block_ranges(pieces, text)
    seen = visible(ranges, 41)
    expected = np.zeros((text, 41), dtype=int)
    for block in blocks:
        expected[block.text_start : block.text_stop, block.visual_start : block.visual_stop] += 1
    np.testing.assert_array_equal(seen.sum(0), expected)
    assert ranges.most == expected.sum(1).max(initial=0)
    tiles = query_tiles((text,), rows, causal, ranges)
    np.testing.assert_array_equal(tiles, plain_query_tiles((text,), rows, causal, ranges))
    check_key_tiles(block_key_tiles(pieces, rows), ranges, 41, rows, 2)


@pytest.mark.parametrize("samples", [1, 3000])
def test_python_work_does_not_grow_with_samples(samples):
    """Lines run, not seconds. A loop over samples runs three lines and more for each."""
    params = build_seq_params(
        (((False, 2), (True, 9), (False, 20)),) * samples, t2v_position="none"
    )
    lengths, pieces = params.text_lengths, pieces_of(params.blocks)
    with lines_of("layers/attention/visible_ranges.py") as counted:
        visual, causal = block_ranges(pieces, sum(lengths)), causal_ranges(lengths, None)
        query_tiles(lengths, 16, causal, visual)
        block_key_tiles(pieces, 16)
        causal_key_tiles(lengths, None, 16)
    assert 0 < counted.lines < 200
