"""The order of `data.group_images`: samples that show the same images stand next to each other.

Their visual rows are computed once where they share a micro-batch, so a group should not be divided
between steps. The groups come in the order in which the plain order has the first sample of each;
one that would stand across the end of a step waits for the next, and others take its place. Like
the plain order it is a pure function of (seed, position), whatever the number of ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np

from dattn_mcore.data.image_sets import without_copies
from dattn_mcore.data.order import SampleOrder, Share

# Groups that may wait. With more of them than this a step is so short, or groups are so large, that
# one has to be divided.
_MOST_WAITING = 64


class GroupedOrder(SampleOrder):
    """The endless order over samples, those of one set of images together.

    Args:
        shares: What an epoch takes of each source.
        seed: Of the order.
        sets: uint64 [samples of the index], from `image_sets`.
        step: Positions of a step, across whose ends no group shall stand; None: steps are cut by
            rows, between groups (`steps.FullSteps`).
    """

    def __init__(
        self, shares: Sequence[Share], seed: int, sets: np.ndarray, step: int | None
    ) -> None:
        super().__init__(shares, seed)
        self._sets, self._step = sets, step

    def epoch(self, epoch: int) -> np.ndarray:
        """Returns the sample numbers of an epoch, in order."""
        numbers = super().epoch(epoch)
        groups, sizes = _by_first(without_copies(self._sets, numbers))
        numbers = numbers[np.argsort(groups, kind="stable")]
        if self._step is None:
            return numbers
        room = self._step - epoch * self.epoch_size % self._step
        return numbers[arrange(sizes, room, self._step)]

    def begins(self, numbers: np.ndarray) -> np.ndarray:
        """Whether a group begins at each sample of an epoch, bool [samples of the epoch]."""
        sets = without_copies(self._sets, numbers)
        return np.r_[True, sets[1:] != sets[:-1]]


def _by_first(sets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Groups numbered by first appearance.

    Args:
        sets: uint64 [samples].

    Returns:
        int64 [samples], the group of each sample; int64 [groups], their sizes.
    """
    _, first, group, sizes = np.unique(
        sets, return_index=True, return_inverse=True, return_counts=True
    )
    order = np.argsort(first)
    number = np.empty(len(order), np.int64)
    number[order] = np.arange(len(order))
    return number[group], sizes[order]


def arrange(sizes: np.ndarray, room: int, step: int) -> np.ndarray:
    """Orders groups so that as few as can be stand across the end of a step.

    Args:
        sizes: Members of each group, int64 [groups]; they stand one group after the other.
        room: Positions of the first step.
        step: Positions of the others.

    Returns:
        int64 [members], which of them stands at each position.
    """
    taken, left = [], room  # (first member, members) of parts of groups
    waiting: deque[tuple[int, int]] = deque()
    coming = _parts(sizes, step)
    part = next(coming, None)
    while part is not None or waiting:
        if part is not None and part[1] <= left:
            chosen, part = part, next(coming, None)
        elif part is not None and len(waiting) < _MOST_WAITING:
            waiting.append(part)
            part = next(coming, None)
            continue
        else:
            first, size = waiting.popleft()
            if size > left:
                waiting.appendleft((first + left, size - left))
            chosen = (first, min(size, left))
        taken.append(chosen)
        left -= chosen[1]
        while not left:
            left = step
            fitting = []
            for group in waiting:
                if group[1] <= left:
                    fitting.append(group)
                    left -= group[1]
            taken += fitting
            if fitting:
                gone = set(fitting)
                waiting = deque(group for group in waiting if group not in gone)
    firsts, counts = np.array(taken, np.int64).reshape(-1, 2).T
    before = np.cumsum(counts) - counts
    return np.repeat(firsts - before, counts) + np.arange(counts.sum())


def _parts(sizes: np.ndarray, step: int) -> Iterator[tuple[int, int]]:
    """(first member, members) of each group, those larger than a step in parts of one step."""
    first = 0
    for size in sizes.tolist():
        end = first + size
        while end - first > step:
            yield first, step
            first += step
        yield first, end - first
        first = end
