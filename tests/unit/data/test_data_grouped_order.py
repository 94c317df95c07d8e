"""The order of data.group_images."""

from __future__ import annotations

from collections import Counter
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dattn_mcore.data.grouped_order import GroupedOrder, arrange
from dattn_mcore.data.image_sets import without_copies
from dattn_mcore.data.order import SampleOrder, Share


def order_of(sets: list[int], step: int | None, seed: int = 3, weight: float = 1.0) -> GroupedOrder:
    share = Share(np.arange(len(sets)), weight)
    return GroupedOrder([share], seed, np.array(sets, np.uint64), step)


SETS = st.lists(st.integers(0, 12), min_size=1, max_size=80)


@settings(max_examples=150, deadline=None)
@given(sets=SETS, step=st.integers(1, 20), seed=st.integers(0, 3))
def test_an_epoch_shows_each_sample_once_and_divides_no_group_without_need(
    sets: list[int], step: int, seed: int
) -> None:
    order = order_of(sets, step, seed)
    for epoch in (0, 1, 2):
        numbers = order.epoch(epoch)
        assert sorted(numbers.tolist()) == list(range(len(sets)))
        room = step - epoch * len(sets) % step
        steps = [0 if i < room else 1 + (i - room) // step for i in range(len(sets))]
        sizes = {one: sets.count(one) for one in sets}
        places: dict[int, list[int]] = {}
        for position, number in enumerate(numbers):
            places.setdefault(sets[number], []).append(position)
        for one, of_group in places.items():
            shown = Counter(steps[position] for position in of_group)
            if len(shown) == 1 or max(sizes.values()) > step:
                assert len(shown) <= -(-sizes[one] // step) + 1
                continue
            # Divided: of the groups that come after the end of its first step, none fitted there.
            first = min(shown)
            later = [size for two, size in sizes.items() if steps[places[two][0]] > first]
            assert all(size > shown[first] for size in later)


def test_groups_of_one_size_that_divides_the_step_are_never_divided() -> None:
    sets = [i // 4 for i in range(400)]
    order = order_of(sets, 16)
    numbers = [sets[n] for n in order.numbers(0, 1600)]
    for start in range(0, 1600, 16):
        runs = [len(list(run)) for _, run in groupby(numbers[start : start + 16])]
        assert runs == [4, 4, 4, 4]


def test_samples_of_text_fill_what_a_group_leaves() -> None:
    """Groups of 3 in steps of 8: with enough single samples beside them none is divided."""
    sets = [i // 3 for i in range(300)] + list(range(1000, 1200))
    numbers = order_of(sets, 8).numbers(0, 496)
    for start in range(0, 496, 8):
        shown = [sets[n] for n in numbers[start : start + 8]]
        assert all(shown.count(one) == 3 for one in shown if one < 1000)


def test_it_is_a_function_of_seed_and_position() -> None:
    sets = [i % 7 for i in range(50)]
    forward, backward = order_of(sets, 8), order_of(sets, 8)
    in_order = [forward.numbers(step * 8, step * 8 + 8) for step in range(20)]
    assert [backward.numbers(s * 8, s * 8 + 8) for s in reversed(range(20))] == in_order[::-1]
    assert order_of(sets, 8, seed=4).numbers(0, 50) != forward.numbers(0, 50)


def test_the_first_samples_of_the_groups_come_as_the_plain_order_has_them() -> None:
    """Without steps to respect, groups differ from the plain order by what follows the first."""
    sets = [i % 5 for i in range(40)]
    plain = SampleOrder([Share(np.arange(40))], 3).epoch(0)
    firsts = list(dict.fromkeys(sets[n] for n in plain))
    numbers = order_of(sets, None).epoch(0)
    assert [one for one, _ in groupby(sets[n] for n in numbers)] == firsts
    for one in firsts:
        assert [n for n in numbers if sets[n] == one] == [n for n in plain if sets[n] == one]


def test_the_second_time_a_sample_is_drawn_is_another_group() -> None:
    sets = [0] * 4 + [1] * 4
    order = order_of(sets, 4, weight=2.0)
    for step in range(4):
        numbers = order.numbers(step * 4, step * 4 + 4)
        assert len(set(numbers)) == 4
        assert len({sets[n] for n in numbers}) == 1


def test_copies_are_numbered_by_how_often_a_sample_came() -> None:
    sets = np.array([7, 7, 9], np.uint64)
    found = without_copies(sets, np.array([0, 1, 0, 2, 0, 1]))
    assert found[0] == found[1] and found[2] == found[5]
    assert len({int(value) for value in found}) == 4
    assert without_copies(sets, np.array([2, 0, 1])).tolist() == [9, 7, 7]


@pytest.mark.parametrize(
    ("sizes", "room", "step", "expected"),
    [
        # 3 + 2 fill a step; the 2 in between comes first, then the 3 that waited.
        ([3, 3, 2, 2], 5, 5, [0, 1, 2, 6, 7, 3, 4, 5, 8, 9]),
        # A group of 7 takes a step of 5 and shares the next.
        ([7, 3], 5, 5, list(range(10))),
        # Nothing fits what is left: the group is divided.
        ([3, 3, 3], 4, 4, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_arranged_by_hand(sizes: list[int], room: int, step: int, expected: list[int]) -> None:
    assert arrange(np.array(sizes), room, step).tolist() == expected
