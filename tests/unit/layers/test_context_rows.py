"""A pack's rows over context parallel ranks: all of them, evenly, and what each sees.

Compared with plain loops over the whole pack, row by row.
"""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dattn_mcore.layers.context import own_text_rows, share_of, text_spans
from dattn_mcore.layers.layout import build_seq_params
from dattn_mcore.types import NO_IMAGES

RANKS = st.integers(1, 8)
NO_LIMIT = settings(deadline=None)  # the first example of a session may be slow
LENGTHS = st.lists(st.integers(0, 40), max_size=8)
# Runs of a sample: text before each image, and text after the last.
RUNS = st.tuples(
    st.lists(st.tuples(st.integers(0, 5), st.integers(1, 9)), max_size=3), st.integers(0, 9)
)


def layout_of(drawn):
    images, last = drawn
    runs = [run for text, visual in images for run in ((False, text), (True, visual)) if run[1]]
    if last or not runs:
        runs.append((False, max(last, 1)))
    return tuple(runs)


LAYOUTS = st.lists(RUNS.map(layout_of), min_size=1, max_size=5).map(tuple)


def rows_of(spans):
    return [row for start, stop in spans for row in range(start, stop)]


def causal_work(spans, lengths):
    """Pairs of a query and a key that it sees, of one rank."""
    starts = [
        sum(lengths[:sample]) for sample in range(len(lengths)) for _ in range(lengths[sample])
    ]
    return sum(row - starts[row] + 1 for row in rows_of(spans))


@NO_LIMIT
@given(lengths=LENGTHS, ranks=RANKS)
@example(lengths=[1] * 8, ranks=3)
def test_every_row_is_on_one_rank_and_counts_are_even(lengths, ranks):
    spans = text_spans(lengths, ranks)
    assert len(spans) == ranks
    assert sorted(row for own in spans for row in rows_of(own)) == list(range(sum(lengths)))
    counts = [len(rows_of(own)) for own in spans]
    assert max(counts) - min(counts) <= 1
    ends = {sum(lengths[:n]) for n in range(len(lengths) + 1)}
    for own in spans:
        assert all(start < stop for start, stop in own)
        assert all(a[1] < b[0] or a[1] in ends for a, b in zip(own, own[1:], strict=False))
        assert not any(start < end < stop for start, stop in own for end in ends)


@given(
    lengths=st.lists(st.integers(0, 6000), max_size=3),
    long=st.integers(1000, 8000),
    ranks=st.integers(2, 8),
)
@settings(NO_LIMIT, max_examples=40)
def test_causal_work_is_even_of_long_samples(lengths, long, ranks):
    """A sample's pieces differ by a row at most: their pairs by its length at most."""
    lengths = [*lengths, long]
    spans = text_spans(lengths, ranks)
    begins = [sum(lengths[:n]) for n in range(len(lengths))]
    work = []
    for own in spans:
        total = 0
        for start, stop in own:
            begin = max(b for b, n in zip(begins, lengths, strict=True) if b <= start and n)
            total += (start - begin + 1 + stop - begin) * (stop - start) // 2
        work.append(total)
    assert sum(work) == sum(n * (n + 1) // 2 for n in lengths)
    mean = sum(work) / ranks
    assert max(work) - mean <= 2 * sum(lengths)
    assert max(work) / mean < 1.05


def test_a_long_sample_is_dealt_from_both_ends():
    """Four pieces a pair of ranks: the first and the last, and those between."""
    assert text_spans([16], 2) == [[(0, 4), (12, 16)], [(4, 12)]]
    assert [causal_work(own, [16]) for own in text_spans([16], 2)] == [10 + 58, 68]
    thirds = text_spans([600], 3)
    assert thirds == [[(0, 100), (500, 600)], [(100, 200), (400, 500)], [(200, 400)]]


def test_short_samples_go_to_all_ranks_in_turn():
    counts = [len(rows_of(own)) for own in text_spans([1] * 10, 4)]
    assert sorted(counts) == [2, 2, 3, 3]


@NO_LIMIT
@given(
    layouts=LAYOUTS,
    ranks=RANKS,
    extra=st.integers(1, 3),
    position=st.sampled_from(["none", "rope"]),
)
def test_shares_hold_all_rows_and_see_what_the_pack_sees(layouts, ranks, extra, position):
    whole = build_seq_params(layouts, t2v_position=position, multiple=ranks * extra)
    check_shares(whole, ranks)


@NO_LIMIT
@given(ranks=RANKS)
def test_shared_visual_rows_are_seen_by_all_their_samples(ranks):
    layouts = (
        ((False, 2), (True, 6), (False, 3), (True, 3), (False, 4)),
        ((False, 5),),
        ((True, 6), (False, 4)),
        ((True, 9), (False, 1)),
        ((False, 1), (True, 6), (False, 7)),
    )
    units = (0, NO_IMAGES, 1, 0, 1)
    check_shares(
        build_seq_params(layouts, t2v_position="none", multiple=ranks, images_of=units), ranks
    )


def check_shares(whole, ranks):
    """What the ranks hold and see, put together, is the pack."""
    text, visual = whole.num_text // ranks, whole.num_visual // ranks
    sees_visual = torch.zeros(whole.num_text, whole.num_visual, dtype=torch.int64)
    sees_text = torch.zeros(whole.num_text, whole.num_text, dtype=torch.int64)
    every = []
    for rank in range(ranks):
        share = share_of(whole, rank, ranks)
        context = share.context
        assert (share.num_visual, share.num_text) == (visual, text) and context.ranks == ranks
        assert (context.num_visual, context.num_text) == (whole.num_visual, whole.num_text)
        rows = own_text_rows(context, rank)
        every.append(rows)
        torch.testing.assert_close(share.text_positions, whole.text_positions[rows])
        here = slice(rank * visual, (rank + 1) * visual)
        torch.testing.assert_close(share.visual_positions, whole.visual_positions[here])
        torch.testing.assert_close(context.order[context.place], torch.arange(whole.num_text))
        for block in context.blocks:
            assert 0 <= block.visual_start < block.visual_stop <= visual
            keys = slice(here.start + block.visual_start, here.start + block.visual_stop)
            sees_visual[block.text_start : block.text_stop, keys] += 1
        for chunk in context.chunks:
            for row in range(chunk.rows):
                stop = chunk.k_stop - (chunk.rows - 1 - row)
                sees_text[rows[chunk.q_start + row], chunk.k_start : stop] += 1
    order = torch.cat(every)
    torch.testing.assert_close(order, context.order)
    torch.testing.assert_close(order.sort().values, torch.arange(whole.num_text))
    wanted = torch.zeros_like(sees_visual)
    for block in whole.blocks:
        wanted[block.text_start : block.text_stop, block.visual_start : block.visual_stop] = 1
    torch.testing.assert_close(sees_visual, wanted)
    causal, start = torch.zeros_like(sees_text), 0
    for length in whole.text_lengths:
        own = slice(start, start + length)
        causal[own, own] = torch.ones(length, length, dtype=torch.int64).tril()
        start += length
    torch.testing.assert_close(sees_text, causal)


def test_padding_rows_fill_up_the_ranks_and_see_nothing():
    whole = build_seq_params((((True, 3), (False, 5)),), t2v_position="none", multiple=4)
    assert (whole.num_visual, whole.num_text) == (4, 8)
    shares = [share_of(whole, rank, 4) for rank in range(4)]
    padding = [
        [row for row in own_text_rows(s.context, r) if row >= 5] for r, s in enumerate(shares)
    ]
    assert sorted(len(rows) for rows in padding) == [0, 1, 1, 1]
    for share, rows in zip(shares, padding, strict=True):
        assert sum(chunk.rows for chunk in share.context.chunks) == 2 - len(rows)


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (((True, 3), (False, 2)), "3 visual and 2 text rows do not divide by 2"),
        (((True, 2), (False, 3)), "2 visual and 3 text rows do not divide by 2"),
    ],
)
def test_rows_that_do_not_divide_are_refused(layout, words):
    whole = build_seq_params((layout,), t2v_position="none", multiple=1)
    with pytest.raises(ValueError, match=words):
        share_of(whole, 0, 2)
