"""Which positions of the endless order make up a step: a fixed number, or as many as fill packs.

Both are pure functions of the order and the settings, never of the layout, so any number of
data-parallel ranks sees the same global batches, and a step's number says what was seen before it.

With a fixed number of samples the number of packs of a step falls between multiples of the ranks,
and what is left of the last ones stays empty. `data.step_packs_multiple` fixes the packs instead:
a step takes samples, in order, as long as their rows fit into the share of its packs' budgets that
the packing is known to reach.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dattn_mcore.config.schema import Config
from dattn_mcore.data.budgets import Fates
from dattn_mcore.data.grouped_order import GroupedOrder
from dattn_mcore.data.index.store import Index
from dattn_mcore.data.order import SampleOrder, Share
from dattn_mcore.data.packing import Lengths, Pack
from dattn_mcore.data.shared_packing import make_shared_packs, shared_pack_into
from dattn_mcore.errors import ConfigError, DataError

_WINDOWS = 8  # parts of the first epoch that are packed to see how full packs can get
_SLACK = 0.01  # of the budgets, below the fill that all of these reached
MOST_OFF = 0.25  # of train.global_batch_size, by which full packs may change a step
_MOST_LEFT = 0.25  # of a step's rows, that are left to the next one to keep a group together


class Steps(Protocol):
    """Cuts the endless order into steps."""

    def bounds(self, step: int) -> tuple[int, int]:
        """First and behind-last position of a step (0-based)."""

    def up_to(self, position: int) -> int:
        """Steps until every position before this one has been taken."""


@dataclass(frozen=True)
class FixedSteps:
    """Steps of one number of samples."""

    size: int

    def bounds(self, step: int) -> tuple[int, int]:
        """First and behind-last position of a step (0-based)."""
        return step * self.size, (step + 1) * self.size

    def up_to(self, position: int) -> int:
        """Steps until every position before this one has been taken."""
        return math.ceil(position / self.size)


class FullSteps:
    """Steps of as many samples as fill a number of packs.

    In a grouped order a group's visual rows count once, and a step ends between groups where that
    does not leave too much of it empty.

    Args:
        order: Of the samples.
        rows: Integers [samples of the index, 2], text and visual rows that each sample takes;
            (0, 0) for one that takes no part.
        budgets: Most text and visual rows of a pack.
        packs: Of a step.
        fill: Share of the packs' budgets that a step's samples may sum up to.
        most: Samples that a step has at most, however short they are.
    """

    def __init__(
        self,
        order: SampleOrder,
        rows: np.ndarray,
        budgets: tuple[int, int],
        packs: int,
        fill: float,
        most: int,
    ) -> None:
        self.packs, self.fill = packs, fill
        self._order, self._rows, self._most = order, rows, most
        self._room = np.array([int(budget * packs * fill) for budget in budgets])
        self._starts = [0]  # of the steps known so far, and behind the last of them
        self._epoch = 0  # in which that lies, and its running sums
        self._sums = self._sums_of(0)

    def bounds(self, step: int) -> tuple[int, int]:
        """First and behind-last position of a step (0-based)."""
        while len(self._starts) <= step + 1:
            self._starts.append(self._end(self._starts[-1]))
        return self._starts[step], self._starts[step + 1]

    def up_to(self, position: int) -> int:
        """Steps until every position before this one has been taken."""
        while self._starts[-1] < position:
            self._starts.append(self._end(self._starts[-1]))
        return int(np.searchsorted(self._starts, position))

    def _sums_of(self, epoch: int) -> np.ndarray:
        """Rows before each position of an epoch, int64 [2, positions + 1]."""
        sums = np.zeros((2, self._order.epoch_size + 1), np.int64)
        numbers = self._order.epoch(epoch)
        visual = self._rows[numbers, 1]
        self._begins: np.ndarray | None = None
        if isinstance(self._order, GroupedOrder):
            self._begins, self._shown = self._order.begins(numbers), visual
            visual = np.where(self._begins, visual, 0)
        np.cumsum(self._rows[numbers, 0], out=sums[0, 1:])
        np.cumsum(visual, out=sums[1, 1:])
        return sums

    def _end(self, start: int) -> int:
        """Where the step that begins at a position ends."""
        room, position, last = self._room, start, start + self._most
        size = self._order.epoch_size
        while position < last:
            epoch, offset = divmod(position, size)
            if epoch != self._epoch:
                self._epoch, self._sums = epoch, self._sums_of(epoch)
            before = self._sums[:, offset].copy()
            if self._begins is not None and not self._begins[offset]:
                before[1] -= self._shown[offset]  # the rest of a group, whose images come again
            fits = min(
                int(np.searchsorted(sums, limit, side="right")) - 1
                for sums, limit in zip(self._sums, before + room, strict=True)
            )
            if fits < size:
                position = epoch * size + self._between_groups(
                    start - epoch * size, fits, before - self._room + room
                )
                break
            position = epoch * size + fits
            room = room - (self._sums[:, size] - before)
        return min(max(position, start + 1), last)

    def _between_groups(self, start: int, end: int, before: np.ndarray) -> int:
        """Where the group begins that `end` would divide, if not too much is left; else `end`.

        Args:
            start: First position of the step, from the epoch's first; below 0 in the one before.
            end: Behind the last position that fits.
            before: Rows before the step, as the epoch's sums count them.
        """
        if self._begins is None:
            return end
        first = max(start + 1, 0)
        begins = first + np.flatnonzero(self._begins[first : end + 1])
        if not len(begins):
            return end
        filled = [
            float(((self._sums[:, position] - before) / self._room).max())
            for position in (int(begins[-1]), end)
        ]
        return int(begins[-1]) if filled[0] >= (1 - _MOST_LEFT) * filled[1] else end


def _begins(order: SampleOrder, numbers: np.ndarray) -> np.ndarray:
    """Whether a group begins at each sample of an epoch; without groups each is one."""
    if isinstance(order, GroupedOrder):
        return order.begins(numbers)
    return np.ones(len(numbers), bool)


def shares_of(index: Index, away: np.ndarray | None = None) -> list[Share]:
    """What an epoch takes of each source of an index.

    Args:
        index: Of the data set.
        away: Bool [samples], those that are not trained on though they could be.

    Raises:
        DataError: It takes nothing: no sample is usable, or the weights are too small.
    """
    usable = np.asarray(index.usable) == 1
    if away is not None:
        usable &= ~away
    shares = [
        Share(start + np.flatnonzero(usable[start:end]), source.weight)
        for (start, end), source in zip(index.source_ranges(), index.settings.sources, strict=True)
    ]
    if any(share.per_epoch for share in shares):
        return shares
    if index.num_usable:
        weights = ", ".join(f"{source.weight:g}" for source in index.settings.sources)
        raise DataError(
            f"data.sources: an epoch takes no sample with the weights {weights}: each source's "
            "usable samples times its weight round to 0; raise a weight"
        )
    raise DataError(
        f"none of {len(index)} samples is usable; why stands in '{index.folder / 'bad.jsonl'}', "
        "and `python -m dattn_mcore.data check` with the same arguments lists it"
    )


def steps_of(config: Config, order: SampleOrder, fates: Fates) -> Steps:
    """The steps of a run.

    Args:
        config: The run.
        order: Of its samples.
        fates: What becomes of each of them.

    Raises:
        ConfigError: `data.step_packs_multiple` does not suit the global batch.
    """
    data, size = config.data, config.train.global_batch_size
    if data.step_packs_multiple is None:
        return FixedSteps(size)
    budgets = (data.text_budget, data.visual_budget)
    return full_steps(order, fates.rows, budgets, size, data.step_packs_multiple)


def full_steps(
    order: SampleOrder, rows: np.ndarray, budgets: tuple[int, int], size: int, multiple: int
) -> FullSteps:
    """Steps of full packs, whose number is that which `size` samples need, rounded.

    How full packs get depends on the lengths (of two images that take 3/5 of the budget each, no
    two share a pack), so parts of the first epoch are packed to see it.

    Args:
        order: Of the samples.
        rows: As of `FullSteps`.
        budgets: Most text and visual rows of a pack.
        size: Samples that a step should have (train.global_batch_size).
        multiple: The packs of a step are a multiple of it.

    Raises:
        ConfigError: No multiple of `multiple` packs holds about `size` samples.
    """
    numbers, most = order.epoch(0), 2 * size
    begins = _begins(order, numbers)
    starts = [order.epoch_size * window // _WINDOWS for window in range(_WINDOWS)]
    places = [np.arange(at, at + most) % len(numbers) for at in starts]
    windows = [(rows[numbers[window]], np.cumsum(begins[window])) for window in places]
    needed = (
        sum(len(_packed(rows_of, groups_of, budgets)) for rows_of, groups_of in windows)
        / _WINDOWS
        / 2
    )
    packs = max(1, round(needed / multiple)) * multiple
    if abs(packs - needed) > MOST_OFF * needed:
        raise ConfigError(
            f"data.step_packs_multiple={multiple}: train.global_batch_size={size} samples fill "
            f"{needed:.1f} packs, and {packs} would be another batch; lower it, or set null for "
            f"exactly {size} samples"
        )
    fill = (
        min(_reachable(rows_of, groups_of, budgets, packs) for rows_of, groups_of in windows)
        - _SLACK
    )
    return FullSteps(order, rows, budgets, packs, fill, most)


def _reachable(
    window: np.ndarray, groups: np.ndarray, budgets: tuple[int, int], packs: int
) -> float:
    """The largest share of the budgets, in hundredths, at which samples still fit the packs."""
    computed = window.copy()
    computed[1:][groups[1:] == groups[:-1], 1] = 0
    sums = np.cumsum(computed, axis=0)
    for hundredths in range(100, 0, -1):
        room = np.array(budgets) * packs * hundredths / 100
        taken = int((sums <= room).all(1).sum())
        lengths, units = _some(window[:taken], groups[:taken])
        if shared_pack_into(lengths, units, budgets, packs) is not None:
            return hundredths / 100
    raise AssertionError("a share without samples fits always")


def _packed(window: np.ndarray, groups: np.ndarray, budgets: tuple[int, int]) -> tuple[Pack, ...]:
    lengths, units = _some(window, groups)
    return make_shared_packs(lengths, units, budgets, 1)


def _some(rows: np.ndarray, groups: np.ndarray) -> tuple[Lengths, list[int]]:
    """Lengths and groups of the samples that take part."""
    part = rows.any(1)
    return [(int(text), int(visual)) for text, visual in rows[part]], groups[part].tolist()
