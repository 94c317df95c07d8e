"""Packs of samples that show the same images."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from dattn_mcore.data.packing import make_packs, pack_into
from dattn_mcore.data.shared_packing import make_shared_packs, shared_pack_into, visual_rows
from dattn_mcore.types import NO_IMAGES

BUDGETS = (50, 64)
UNITS = st.lists(st.tuples(st.integers(1, 50), st.integers(-1, 6)), min_size=1, max_size=40)


def lengths_of(samples: list[tuple[int, int]]) -> tuple[list[tuple[int, int]], list[int]]:
    """Samples of unit u have 16 * (u % 4 + 1) visual rows."""
    units = [unit for _, unit in samples]
    return [(text, 16 * (unit % 4 + 1) if unit >= 0 else 0) for text, unit in samples], units


@settings(max_examples=150, deadline=None)
@given(samples=UNITS, multiple=st.integers(1, 3))
def test_every_sample_has_one_place_and_packs_keep_the_budgets(
    samples: list[tuple[int, int]], multiple: int
) -> None:
    lengths, units = lengths_of(samples)
    packs = make_shared_packs(lengths, units, BUDGETS, multiple)
    apart = make_packs(lengths, *BUDGETS, multiple)
    assert sorted(i for pack in packs for i in pack) == list(range(len(samples)))
    assert len(packs) % multiple == 0 and len(packs) <= len(apart)
    for pack in packs:
        assert sum(lengths[i][0] for i in pack) <= BUDGETS[0]
        assert sum({units[i]: lengths[i][1] for i in pack}.values()) <= BUDGETS[1]
    assert len(packs) < len(apart) or visual_rows(packs, lengths, units) <= visual_rows(
        apart, lengths, units
    )


@settings(max_examples=50, deadline=None)
@given(samples=UNITS)
def test_samples_of_different_images_are_packed_as_ever(samples: list[tuple[int, int]]) -> None:
    lengths, _ = lengths_of(samples)
    units = [i if visual else NO_IMAGES for i, (_, visual) in enumerate(lengths)]
    assert make_shared_packs(lengths, units, BUDGETS, 1) == make_packs(lengths, *BUDGETS, 1)
    assert shared_pack_into(lengths, units, BUDGETS, 9) == pack_into(lengths, BUDGETS, 9)


def test_questions_on_one_image_share_a_pack() -> None:
    """Ten samples of a full visual budget each: ten packs apart, one together."""
    lengths, units = [(5, 64)] * 10, [0] * 10
    assert len(make_packs(lengths, *BUDGETS, 1)) == 10
    assert make_shared_packs(lengths, units, BUDGETS, 1) == (tuple(range(10)),)
    assert visual_rows([tuple(range(10))], lengths, units) == 64


def test_text_over_the_budget_divides_them() -> None:
    lengths, units = [(20, 64)] * 5, [0] * 5
    packs = make_shared_packs(lengths, units, BUDGETS, 1)
    assert sorted(map(len, packs)) == [1, 2, 2]
    assert visual_rows(packs, lengths, units) == 3 * 64


def test_they_are_divided_where_that_needs_fewer_packs() -> None:
    """Groups of 26 text rows fit 50 once, so eight of them want eight packs; samples fit five."""
    lengths = [(13, 8)] * 16
    units = [i // 2 for i in range(16)]
    packs = make_shared_packs(lengths, units, BUDGETS, 1)
    assert len(packs) == len(make_packs(lengths, *BUDGETS, 1)) == 6
