"""Tiles over context parallel ranks: each is encoded once, and its rows arrive where they belong."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dattn_mcore.models.tile_share import (
    TilePlace,
    places_of,
    share_tiles,
    stitched_order,
)
from dattn_mcore.types import image_shapes, tiles_of_rank

GRIDS = st.lists(st.sampled_from([(0, 0), (1, 1), (2, 1), (1, 3), (2, 2), (3, 2)]), max_size=5).map(
    tuple
)
RANKS = st.integers(1, 8)
NO_LIMIT = settings(deadline=None)  # the first example of a session may be slow
SIDE = 2


def tiles_in(grids):
    return sum(1 + columns * rows for columns, rows in grids)


def plain_rows(grids):
    """(tile, row, column) of each visual row, image by image, read off as a picture is."""
    found, first = [], 0
    for columns, rows in grids:
        found += [(first, y, x) for y in range(SIDE) for x in range(SIDE)]
        found += [
            (first + 1 + y // SIDE * columns + x // SIDE, y % SIDE, x % SIDE)
            for y in range(rows * SIDE)
            for x in range(columns * SIDE)
        ]
        first += 1 + columns * rows
    return found


@NO_LIMIT
@given(num_tiles=st.integers(0, 60), ranks=RANKS)
def test_every_tile_is_on_one_rank_and_counts_are_even(num_tiles, ranks):
    of_ranks = [tiles_of_rank(num_tiles, rank, ranks) for rank in range(ranks)]
    assert [tile for tiles in of_ranks for tile in tiles] == list(range(num_tiles))
    counts = [len(tiles) for tiles in of_ranks]
    assert max(counts) - min(counts) <= 1


@NO_LIMIT
@given(grids=GRIDS)
def test_the_order_is_that_of_a_picture(grids):
    order = stitched_order(tiles_in(grids), image_shapes(grids), SIDE)
    found = [(n // SIDE**2, n % SIDE**2 // SIDE, n % SIDE) for n in order.tolist()]
    assert found == plain_rows(grids)


@NO_LIMIT
@given(grids=GRIDS)
def test_each_tile_has_its_place_on_its_canvas(grids):
    places = places_of(tiles_in(grids), image_shapes(grids))
    assert len(places) == tiles_in(grids)
    expected = []
    for columns, rows in grids:
        expected.append(TilePlace())
        expected += [TilePlace((columns, rows), number) for number in range(columns * rows)]
    assert places == expected
    assert places_of(3, ()) == [TilePlace()] * 3


@NO_LIMIT
@given(grids=GRIDS, ranks=RANKS, padding=st.integers(0, 9))
@example(grids=((3, 2),), ranks=4, padding=0)  # one canvas over all ranks
@example(grids=((0, 0),), ranks=8, padding=0)  # most ranks encode nothing
@example(grids=(), ranks=2, padding=1)
def test_the_exchange_brings_each_row_to_its_place(grids, ranks, padding):
    """By hand, with a row's number as its content: what a rank sends, and where what comes goes."""
    num_tiles = tiles_in(grids)
    real = num_tiles * SIDE**2
    num_visual = -(-(real + padding) // ranks) * ranks
    shares = [
        share_tiles(
            num_tiles=num_tiles,
            items=image_shapes(grids),
            side=SIDE,
            num_visual=num_visual,
            rank=rank,
            ranks=ranks,
        )
        for rank in range(ranks)
    ]
    assert [tile for share in shares for tile in share.tiles] == list(range(num_tiles))
    sent = []
    for share in shares:
        rows = torch.arange(share.tiles.start * SIDE**2, share.tiles.stop * SIDE**2)
        assert sum(share.send_counts) == len(share.send) == len(rows)
        sent.append(rows[share.send].split(share.send_counts))
    found = torch.full((ranks, num_visual // ranks), -1)
    for rank, share in enumerate(shares):
        arrived = [sent[source][rank] for source in range(ranks)]
        assert [len(rows) for rows in arrived] == list(share.receive_counts)
        assert share.num_visual == num_visual // ranks
        found[rank, share.place] = torch.cat(arrived)
    numbers = [tile * SIDE**2 + y * SIDE + x for tile, y, x in plain_rows(grids)]
    assert found.flatten().tolist() == numbers + [-1] * (num_visual - real)


def test_a_tile_that_stays_is_not_sent():
    share = share_tiles(num_tiles=4, items=(), side=SIDE, num_visual=16, rank=1, ranks=2)
    assert share.tiles == range(2, 4) and share.send_counts == share.receive_counts == (0, 8)
    assert share.place.tolist() == list(range(8))


@pytest.mark.parametrize("ranks", [2, 4])
def test_tiles_of_a_canvas_send_to_several_ranks(ranks):
    """A tile's lines are not next to each other on the canvas."""
    receivers = [
        sum(
            count > 0
            for count in share_tiles(
                num_tiles=7,
                items=image_shapes([(3, 2)]),
                side=SIDE,
                num_visual=28,
                rank=rank,
                ranks=ranks,
            ).send_counts
        )
        for rank in range(ranks)
    ]
    assert max(receivers) > 1
