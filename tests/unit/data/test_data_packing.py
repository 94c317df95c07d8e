"""The plan of packs: properties that must hold for every global batch."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dattn_mcore.data import packing
from dattn_mcore.data.balance import split_over_ranks
from dattn_mcore.data.packing import make_packs, pack_into
from tests.counted_lines import lines_of
from tests.unit.data import plain_packing

TEXT, VISUAL = 50, 64
LENGTHS = st.lists(
    st.tuples(st.integers(1, TEXT), st.sampled_from([0, 16, 32, 48, 64])), max_size=60
)


@settings(max_examples=200, deadline=None)
@given(lengths=LENGTHS, dp_size=st.sampled_from([1, 2, 3, 4]), group=st.sampled_from([1, 2, 4]))
def test_every_sample_once_within_both_budgets(
    lengths: list[tuple[int, int]], dp_size: int, group: int
) -> None:
    multiple = dp_size * group
    packs = make_packs(lengths, TEXT, VISUAL, multiple)
    assert len(packs) > 0
    assert len(packs) % multiple == 0
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    for pack in packs:
        assert sum(lengths[i][0] for i in pack) <= TEXT
        assert sum(lengths[i][1] for i in pack) <= VISUAL
        assert list(pack) == sorted(pack)
    assert make_packs(list(lengths), TEXT, VISUAL, multiple) == packs
    shares = split_over_ranks(packs, lengths, dp_size, (TEXT, VISUAL))
    assert len(shares) == dp_size
    assert {len(share) for share in shares} == {len(packs) // dp_size}
    assert sorted(i for share in shares for pack in share for i in pack) == list(
        range(len(lengths))
    )
    for pack in (pack for share in shares for pack in share):
        assert sum(lengths[i][0] for i in pack) <= TEXT
        assert sum(lengths[i][1] for i in pack) <= VISUAL
    assert split_over_ranks(packs, list(lengths), dp_size, (TEXT, VISUAL)) == shares


@settings(max_examples=100, deadline=None)
@given(lengths=LENGTHS)
def test_few_packs(lengths: list[tuple[int, int]]) -> None:
    # First-fit keeps all packs but one more than half full in one of the two budgets.
    packs = make_packs(lengths, TEXT, VISUAL, 1)
    bound = sum(t for t, _ in lengths) / TEXT + sum(v for _, v in lengths) / VISUAL
    assert len(packs) <= 2 * bound + 1


def test_no_more_packs_than_needed_for_equal_samples() -> None:
    assert len(make_packs([(10, 16)] * 20, 50, 64, 1)) == 5
    assert len(make_packs([(10, 16)] * 20, 40, 64, 2)) == 6


def test_loads_are_balanced() -> None:
    rng = random.Random(1)
    lengths = [(rng.randint(10, 60), 16) for _ in range(256)]
    packs = make_packs(lengths, 512, 512, 4)
    rows = [sum(sum(lengths[i]) for i in pack) for pack in packs]
    longest = max(sum(one) for one in lengths)
    assert max(rows) - min(rows) <= longest
    shares = split_over_ranks(packs, lengths, 4, (512, 512))
    totals = [sum(sum(lengths[i]) for pack in share for i in pack) for share in shares]
    assert max(totals) - min(totals) <= longest


def test_fewer_samples_than_packs_leaves_empty_ones() -> None:
    packs = make_packs([(5, 16)], 50, 64, 4)
    assert sorted(packs) == [(), (), (), (0,)]


def test_a_sample_over_a_budget_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="fits no pack"):
        make_packs([(51, 0)], 50, 64, 1)


def test_packs_that_cannot_be_divided() -> None:
    with pytest.raises(ValueError, match="divided"):
        split_over_ranks([(0,), (1,), (2,)], [(1, 0)] * 3, 2, (TEXT, VISUAL))


def test_ranks_of_unlike_samples_have_equal_work() -> None:
    """Long and short answers, one to five tiles: dealing packs alone leaves ranks 10 % apart."""
    rng = random.Random(2)
    lengths = [
        (int(rng.lognormvariate(4.5, 1.0)) % 1500 + 8, 729 * rng.choice([0, 1, 3, 4, 5]))
        for _ in range(128)
    ]
    budgets, work = (4096, 11664), (1.0, 1.4)
    for dp_size in (2, 4, 8):
        packs = make_packs(lengths, *budgets, dp_size)
        shares = split_over_ranks(packs, lengths, dp_size, budgets, work)
        loads = [
            sum(lengths[i][0] + 1.4 * lengths[i][1] for pack in share for i in pack)
            for share in shares
        ]
        assert max(loads) <= 1.05 * sum(loads) / dp_size


def some_lengths(seed: int, samples: int, budgets: tuple[int, int]) -> list[tuple[int, int]]:
    """Few sizes or many, equal samples, text only, samples as large as a budget."""
    rng = random.Random(seed)
    sizes = [rng.randint(1, budgets[1]) for _ in range(rng.choice([1, 2, 5, 40]))] + [0]
    texts = [rng.randint(1, budgets[0]) for _ in range(rng.choice([1, 3, 60]))]
    small = rng.choice([1, 2, 8])  # samples to a pack, about
    return [
        (max(1, rng.choice(texts) // small), rng.choice(sizes) // rng.choice([1, small]))
        for _ in range(samples)
    ]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    samples=st.integers(0, 250),
    budgets=st.sampled_from([(50, 64), (4096, 5832), (97, 101), (64, 64)]),
    more=st.sampled_from([-2, -1, 0, 1, 5, 100]),
)
def test_packs_are_those_of_the_plain_search(
    seed: int, samples: int, budgets: tuple[int, int], more: int
) -> None:
    """Every greedy order and rule, and sums of images, at counts of packs that fit and that do not.

    Up to some hundred packs: several blocks of the search.
    """
    lengths = some_lengths(seed, samples, budgets)
    need = max(-(-sum(pair[kind] for pair in lengths) // budgets[kind]) for kind in (0, 1))
    count = max(1, need + more)
    for (order, kind), (plain_order, score) in zip(
        packing._GREEDY, plain_packing.GREEDY, strict=True
    ):
        found = packing._place(lengths, budgets, count, order, kind)
        assert found == plain_packing.place(lengths, budgets, count, plain_order, score)
    if len({visual for _, visual in lengths}) < 6:  # the plain way takes minutes for more
        found = packing._place_by_sums(lengths, budgets, count)
        assert found == plain_packing.place_by_sums(lengths, budgets, count)
        assert pack_into(lengths, budgets, count) == plain_packing.pack_into(
            lengths, budgets, count
        )


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.dictionaries(st.integers(1, 60), st.integers(1, 6), max_size=8),
    room=st.integers(60, 300),
)
def test_best_sums_are_those_of_the_plain_search(sizes: dict[int, int], room: int) -> None:
    found, plain = packing._best_sum(sizes, room), plain_packing._best_sum(sizes, room)
    assert list(found.items()) == list(plain.items())


WAYS = [*packing._GREEDY, None]


@pytest.mark.parametrize("place", WAYS, ids=[f"way{number}" for number in range(len(WAYS))])
def test_python_work_of_packing_is_linear_in_samples(place: tuple | None) -> None:
    """Lines run, not seconds: four times the samples, and packs, take four times the lines.

    Where every sample asks every pack it is sixteen times.
    """
    lines = []
    for samples in (500, 2000):
        rng = random.Random(3)
        lengths = [
            (int(rng.lognormvariate(4.5, 1.0)) % 1500 + 8, 729 * rng.choice([0, 1, 3, 4, 5]))
            for _ in range(samples)
        ]
        arguments = lengths, (4096, 11664), samples // 5
        with lines_of("dattn_mcore/data/") as counted:
            if place is None:
                packing._place_by_sums(*arguments)
            else:
                assert packing._place(*arguments, *place) is not None
        lines.append(counted.lines)
    assert lines[1] < 5 * lines[0]
