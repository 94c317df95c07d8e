"""The generator of cases: every pair is there, nothing that is excluded, and few cases."""

from math import prod

import pytest

from tests.pairwise import all_pairs, pairs_of, pairwise

FACTORS = {"a": (1, 2, 3, 4, 5), "b": (False, True), "c": (None, 3, "x"), "d": (1.5, 2.5, 3.5)}
EXCLUDED = {
    frozenset({("a", 1), ("b", True)}),
    frozenset({("a", 2), ("b", True)}),
    frozenset({("d", 1.5), ("c", 3)}),
}


def found(cases):
    return set().union(*map(pairs_of, cases))


def test_pairs_are_counted_by_hand():
    """5 x 2 + 5 x 3 + 5 x 3 + 2 x 3 + 2 x 3 + 3 x 3."""
    assert len(set(all_pairs(FACTORS))) == len(all_pairs(FACTORS)) == 61
    assert frozenset({("a", 5), ("d", 3.5)}) in all_pairs(FACTORS)
    assert frozenset({("a", 5), ("a", 4)}) not in all_pairs(FACTORS)


@pytest.mark.parametrize("excluded", [set(), EXCLUDED], ids=["free", "excluded"])
def test_every_pair_is_covered_and_none_that_is_excluded(excluded):
    cases = pairwise(FACTORS, excluded)
    assert found(cases) == set(all_pairs(FACTORS)) - excluded
    for case in cases:
        assert list(case) == list(FACTORS)
        assert all(case[name] in values for name, values in FACTORS.items())


@pytest.mark.parametrize("values", [2, 3, 4])
def test_cases_are_few_and_always_the_same(values):
    """Of eight factors; the least possible is the square of the values, a product their power."""
    factors = {name: tuple(range(values)) for name in "abcdefgh"}
    cases = pairwise(factors)
    assert cases == pairwise(factors)
    assert values**2 <= len(cases) <= 2.5 * values**2 < prod(map(len, factors.values()))


def test_required_settings_stand_in_a_case():
    required = [{"a": 5, "b": True, "c": "x"}, {"d": 3.5}]
    cases = pairwise(FACTORS, EXCLUDED, required)
    for case, settings in zip(cases, required, strict=False):
        assert settings.items() <= case.items()
    assert found(cases) == set(all_pairs(FACTORS)) - EXCLUDED


def test_a_value_taken_first_is_given_up_where_it_leads_nowhere():
    """a=1 goes with b=1 alone, which goes with c=1 alone: the usual values are no way out."""
    factors = {"a": (0, 1), "b": (0, 1), "c": (0, 1)}
    excluded = {frozenset({("a", 1), ("b", 0)}), frozenset({("b", 1), ("c", 0)})}
    excluded.add(frozenset({("a", 1), ("c", 0)}))
    cases = pairwise(factors, excluded)
    assert found(cases) == set(all_pairs(factors)) - excluded


@pytest.mark.parametrize(
    ("excluded", "required"),
    [
        ({frozenset({("a", 1), ("b", True)})}, [{"a": 1, "b": True}]),
        # a=1 is left without any value of b.
        ({frozenset({("a", 1), ("b", value)}) for value in (False, True)}, []),
    ],
    ids=["required", "no-way-out"],
)
def test_a_pair_that_can_stand_in_no_case_is_an_error(excluded, required):
    with pytest.raises(ValueError, match="no case can hold .*'a': 1"):
        pairwise(FACTORS, excluded, required)
