"""A part of many questions: the same one each time, spread over their categories."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """A question, as far as the choice depends on it.

    Attributes:
        key: what tells it from the others.
        category: group for the score.
        group: questions of an equal one are chosen together; None: this one is chosen alone.
    """

    key: str
    category: str = ""
    group: Hashable = None


def subset(items: Sequence[Item], limit: int | None) -> list[int]:
    """Places of the chosen questions, ascending.

    Categories keep their shares. Within one, a hash of the questions decides, and not their order:
    neighbours are often about one image, or yes and no in turn.

    Args:
        items: all questions, in the order of their file.
        limit: how many at most; a group that is larger by itself is chosen as a whole. None: all.
    """
    if limit is None or limit >= len(items):
        return list(range(len(items)))
    groups: dict[Hashable, list[int]] = {}
    for place, item in enumerate(items):
        own = ("alone", place) if item.group is None else ("group", item.group)
        groups.setdefault(own, []).append(place)
    categories = {name: at for at, name in enumerate(dict.fromkeys(i.category for i in items))}

    def rank(group: list[int]) -> tuple[int, str]:
        first = items[group[0]]
        return categories[first.category], hashlib.sha256(first.key.encode()).hexdigest()

    ranked = sorted(groups.values(), key=rank)
    for count in range(max(1, limit * len(ranked) // len(items)), 0, -1):
        # The middle of each of `count` equal shares.
        chosen = [ranked[(2 * n + 1) * len(ranked) // (2 * count)] for n in range(count)]
        if sum(map(len, chosen)) <= limit:
            break
    return sorted(place for group in chosen for place in group)
