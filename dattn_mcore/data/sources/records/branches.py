"""Branches: several conversations about a record's images, in one record.

`branches` is a list of lists of turns, in the place of the key that holds the turns of the form.
Every branch is read as a record of its own would be, with the record's images, system text and
tools; all of them must show the same images in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from dattn_mcore.data.sources.metadata import is_filled
from dattn_mcore.data.sources.record import Inside, Sample, kind
from dattn_mcore.errors import DataError

KEY = "branches"
_FEWEST = 2


def has_branches(record: Mapping[str, Any], turns: str) -> bool:
    """Whether a record has branches where its form may have some.

    Args:
        record: The record.
        turns: `Form.branch_turns`.
    """
    # A column of a table is there, and empty, in rows that have none.
    return bool(turns) and is_filled(record.get(KEY))


def turns_of_branches(record: Mapping[str, Any]) -> list[Any]:
    """The turns of each branch, unchecked; none where `branches` is no list."""
    found = record.get(KEY)
    return found if isinstance(found, list) else []


def read_branches(
    record: Mapping[str, Any],
    turns: str,
    others: tuple[str, ...],
    read: Callable[[dict[str, Any]], Sample],
) -> Sample:
    """Reads a record that has branches.

    Args:
        record: The record.
        turns: The key under which its form has turns.
        others: Keys of turns that must be absent.
        read: Reads a record of one conversation.

    Raises:
        DataError: What is wrong, without saying where the record stands.
    """
    given = record[KEY]
    for key in others:
        if is_filled(record.get(key)):
            raise DataError(f"'{key}' and 'branches' both hold turns; give one of them")
    if not isinstance(given, list) or len(given) < _FEWEST:
        what = "one" if isinstance(given, list) else kind(given)
        raise DataError(f"'branches' must be a list of at least two lists of turns, got {what}")
    rest = {key: value for key, value in record.items() if key != KEY}
    branches: list[Sample] = []
    for number, branch in enumerate(given):
        if not isinstance(branch, list) or not branch:
            got = kind(branch)
            raise DataError(f"branch {number} must be a non-empty list of turns, got {got}")
        try:
            branches.append(read({**rest, turns: branch}))
        except DataError as error:
            raise DataError(f"branch {number}: {error}") from None
        if _shown(branches[-1]) != _shown(branches[0]):
            raise DataError(
                f"branch {number} shows other images than branch 0; all branches of a record are "
                "about the same images, in the same order"
            )
    ignored = dict.fromkeys(name for branch in branches for name in branch.ignored)
    return Sample(
        id=branches[0].id,
        images=branches[0].images,
        turns=(),
        ignored=tuple(ignored),
        weight=branches[0].weight,
        # What all of them have in common is kept once.
        branches=tuple(replace(branch, images=(), ignored=()) for branch in branches),
    )


def _shown(sample: Sample) -> list[Any]:
    """What tells the images of a sample from others."""
    return [one.data if isinstance(one, Inside) else one for one in sample.images]
