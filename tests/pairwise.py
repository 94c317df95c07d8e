"""Few cases that hold every pair of values: what a full product would find, where two meet.

A fault that needs three values at once can pass; where three are known to matter, the test names
them as a case that must be there.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from itertools import combinations
from typing import Any

Case = dict[str, Any]
Setting = tuple[str, Any]  # a factor's name and one of its values
Pair = frozenset[Setting]


def pairwise(
    factors: Mapping[str, Sequence[Any]],
    excluded: Set[Pair] = frozenset(),
    required: Sequence[Mapping[str, Any]] = (),
    fits: Callable[[Case], bool] = lambda case: True,
) -> list[Case]:
    """Cases that together hold every pair of values of two factors; always the same ones.

    Args:
        factors: values of each factor, hashable; the first is the usual one.
        excluded: pairs that no case may hold.
        required: settings that some case must hold together; the rest of it is free.
        fits: whether a case can be run; what does not fit fits with no value more.

    Raises:
        ValueError: a required or uncovered pair can stand in no case.
    """
    left = dict.fromkeys(all_pairs(factors, excluded))  # a dict keeps its order
    order = random.Random(0)  # of the factors: with the same one each time, pairs come again
    waiting = list(required)
    cases = []
    while waiting or left:
        start = dict(waiting.pop(0) if waiting else next(iter(left)))
        free = {name: values for name, values in factors.items() if name not in start}
        names = sorted(free, key=lambda _: order.random())
        case = next(_completions(start, [(n, free[n]) for n in names], excluded, left, fits), None)
        if case is None or pairs_of(case) & excluded:
            raise ValueError(f"no case can hold {start}: a pair that it needs is excluded")
        cases.append({name: case[name] for name in factors})
        for pair in pairs_of(case):
            left.pop(pair, None)
    return cases


def all_pairs(factors: Mapping[str, Sequence[Any]], excluded: Set[Pair] = frozenset()):
    """Every pair of values of two factors that is not excluded, as a list."""
    return [
        pair
        for first, second in combinations(factors, 2)
        for a in factors[first]
        for b in factors[second]
        if (pair := frozenset({(first, a), (second, b)})) not in excluded
    ]


def pairs_of(case: Mapping[str, Any]) -> set[Pair]:
    """The pairs that a case holds."""
    return {frozenset(pair) for pair in combinations(case.items(), 2)}


def _completions(
    case: Case,
    free: Sequence[tuple[str, Sequence[Any]]],
    excluded: Set[Pair],
    left: Mapping[Pair, None],
    fits: Callable[[Case], bool],
) -> Iterator[Case]:
    """Whole cases, depth first; each factor takes the values first that cover most pairs left."""
    if not free:
        yield case
        return
    (name, values), *others = free
    ranked = []
    for value in values:
        new = {frozenset({(name, value), old}) for old in case.items()}
        if not new & excluded and fits({**case, name: value}):
            ranked.append((-len(new & left.keys()), value))
    for _, value in sorted(ranked, key=lambda one: one[0]):  # stable: the usual value first
        yield from _completions({**case, name: value}, others, excluded, left, fits)
