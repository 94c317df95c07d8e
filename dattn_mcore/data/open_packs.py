"""The packs that are being filled, and which of them a sample fits best.

Every sample asks all packs, so that is done in NumPy, and blocks of packs that cannot hold the best
one are left out by a bound: samples cost nearly the same however many packs there are. Scores are
computed in the same steps as in plain Python, to the last bit, and of equal ones the first pack's
wins: which samples share a pack must not depend on how it was found.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

_BLOCK = 64


class OpenPacks(ABC):
    """Packs with room; the one with the lowest score gets a sample.

    Packs are opened one by one, as soon as the one before is not empty: of empty packs, all alike,
    the first is taken.

    Args:
        budgets: Most text and visual rows of a pack.
        count: Packs.
    """

    def __init__(self, budgets: tuple[int, int], count: int) -> None:
        self.budgets, self.count = budgets, count
        self.members: list[list[int]] = [[] for _ in range(count)]
        shape = -(-max(count, 1) // _BLOCK), _BLOCK
        # A pack that is not open has no room.
        self._loads = np.full((2, *shape), np.iinfo(np.int64).max)
        self._least = np.full((2, shape[0]), np.iinfo(np.int64).max)  # of the blocks
        self._blocks = 0  # with an open pack
        self._open = 0
        self._open_next()

    def place(self, index: int, text: int, visual: int) -> bool:
        """Puts a sample into the pack with the lowest score; False where it fits none."""
        pack = self._best(text, visual)
        if pack < 0:
            return False
        at = divmod(pack, _BLOCK)
        self._set(at, int(self._loads[0][at]) + text, int(self._loads[1][at]) + visual)
        self.members[pack].append(index)
        if pack == self._open - 1:
            self._open_next()
        return True

    def _open_next(self) -> None:
        if self._open < self.count:
            at = divmod(self._open, _BLOCK)
            self._open += 1
            self._blocks = at[0] + 1
            self._set(at, 0, 0)

    def _set(self, at: tuple[int, int], text: int, visual: int) -> None:
        self._loads[:, at[0], at[1]] = text, visual
        self._least[:, at[0]] = self._loads[:, at[0]].min(axis=1)
        self._changed(at, text, visual)

    def _best(self, text: int, visual: int) -> int:
        room = self.budgets[0] - text, self.budgets[1] - visual
        least = self._least[:, : self._blocks]
        blocks = np.flatnonzero((least[0] <= room[0]) & (least[1] <= room[1]))
        if not blocks.size:
            return -1
        bounds = self._bounds(text, visual, blocks)
        first = int(bounds.argmin())
        pack, score = self._best_in(text, visual, blocks[first : first + 1])
        others = bounds < score
        others[:first] |= bounds[:first] <= score
        others[first] = False
        if others.any():
            other, other_score = self._best_in(text, visual, blocks[others])
            if (other_score, other) < (score, pack):
                pack, score = other, other_score
        return pack if score < np.inf else -1

    def _best_in(self, text: int, visual: int, blocks: np.ndarray) -> tuple[int, float]:
        loads = self._loads[:, blocks]
        fits = (loads[0] <= self.budgets[0] - text) & (loads[1] <= self.budgets[1] - visual)
        scores = np.where(fits, self._scores(text, visual, blocks), np.inf)
        block, place = divmod(int(scores.argmin()), _BLOCK)
        return int(blocks[block]) * _BLOCK + place, float(scores[block, place])

    @abstractmethod
    def _changed(self, at: tuple[int, int], text: int, visual: int) -> None:
        """Keeps what scores need of a pack (block, place), whose loads are now these."""

    @abstractmethod
    def _scores(self, text: int, visual: int, blocks: np.ndarray) -> np.ndarray:
        """[blocks, packs of a block]; that of a pack that is not open is not used."""

    @abstractmethod
    def _bounds(self, text: int, visual: int, blocks: np.ndarray) -> np.ndarray:
        """What no score in a block is below."""


class _ByLoad(OpenPacks):
    """Scores that depend on what a pack holds, not on the sample."""

    def __init__(self, budgets: tuple[int, int], count: int) -> None:
        shape = -(-max(count, 1) // _BLOCK), _BLOCK
        self._score, self._lowest = np.full(shape, np.inf), np.full(shape[0], np.inf)
        super().__init__(budgets, count)

    @abstractmethod
    def _of(self, text: int, visual: int) -> float:
        """Score of a pack with these loads."""

    def _changed(self, at: tuple[int, int], text: int, visual: int) -> None:
        self._score[at] = self._of(text, visual)
        self._lowest[at[0]] = self._score[at[0]].min()

    def _scores(self, text: int, visual: int, blocks: np.ndarray) -> np.ndarray:
        return self._score[blocks]

    def _bounds(self, text: int, visual: int, blocks: np.ndarray) -> np.ndarray:
        return self._lowest[blocks]


class Emptiest(_ByLoad):
    """The pack with the fewest rows."""

    def _of(self, text: int, visual: int) -> float:
        return text + visual


class Fullest(_ByLoad):
    """The pack whose fuller budget is filled most."""

    def _of(self, text: int, visual: int) -> float:
        return -max(text / self.budgets[0], visual / self.budgets[1])


class BestMatch(OpenPacks):
    """The pack whose room has the proportions of what the sample needs."""

    def __init__(self, budgets: tuple[int, int], count: int) -> None:
        shape = -(-max(count, 1) // _BLOCK), _BLOCK
        self._left = np.ones((3, *shape))  # shares of text and visual rows, and their length
        self._slopes = np.full(shape, 0.5**0.5)  # text's share over the length
        self._range = np.full((2, shape[0]), 0.5**0.5)  # of the slopes in a block
        super().__init__(budgets, count)

    def _changed(self, at: tuple[int, int], text: int, visual: int) -> None:
        left_text, left_visual = 1 - text / self.budgets[0], 1 - visual / self.budgets[1]
        length = max((left_text**2 + left_visual**2) ** 0.5, 1e-9)
        self._left[:, at[0], at[1]] = left_text, left_visual, length
        self._slopes[at] = min(left_text / length, 1.0)
        slopes = self._slopes[at[0]]
        self._range[:, at[0]] = slopes.min(), slopes.max()

    def _scores(self, text: int, visual: int, blocks: np.ndarray) -> np.ndarray:
        left = self._left[:, blocks]
        match = text / self.budgets[0] * left[0] + visual / self.budgets[1] * left[1]
        return -match / left[2]

    def _bounds(self, text: int, visual: int, blocks: np.ndarray) -> np.ndarray:
        # The match is best in the sample's own direction, and falls to both sides of it.
        share_text, share_visual = text / self.budgets[0], visual / self.budgets[1]
        own = share_text / max((share_text**2 + share_visual**2) ** 0.5, 1e-9)
        low, high = self._range[:, blocks]
        slope = np.clip(own, low, high)
        match = share_text * slope + share_visual * np.sqrt(1 - slope * slope)
        return -match - 1e-9  # rounding
