"""What becomes of samples that fit no micro-batch, and whether what is left can train the model.

The index knows the rows of every sample, so both are known before the first step. `Fates` is the
only place that decides it: training, its steps, `check`, `stats` and `preview` all ask it.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np

from dattn_mcore.config.optim_groups import part_learns
from dattn_mcore.config.schema import Config
from dattn_mcore.data.fitted_sample import FittedSample, fitted_sample
from dattn_mcore.data.index.store import Index
from dattn_mcore.errors import DataError

_NAMED = 3  # in an error's one line
_AT_ONCE = 65536  # cut samples whose images are looked at together


class Fates:
    """Whether each sample of an index is read whole, cut, or left out, and why.

    With `data.over_budget=truncate` text is cut at the end, and images behind the cut go with it.
    A sample that still fits no pack, has nothing left to predict, or has branches is left out even
    then. With `skip` and `error` nothing is cut; with `error` the run ends at the first of them.

    Args:
        index: Of the data set.
        config: The run.

    Attributes:
        cut: Bool [samples], those that are cut; not among `left_out`.
        left_out: Bool [samples], those that are usable and fit no micro-batch.
    """

    def __init__(self, index: Index, config: Config) -> None:
        data = config.data
        self._index, self._data = index, data
        self._per_tile = config.model.vision.rows_per_tile
        text_rows = np.asarray(index.samples["text_rows"])
        usable = np.asarray(index.usable) == 1
        long = usable & (text_rows > data.text_budget)
        self.cut = np.zeros(len(index), bool)
        self.left_out = long | (usable & (self._visual_rows() > data.visual_budget))
        self._tiles_left: dict[int, int] = {}  # of samples whose cut takes images away
        if data.over_budget != "truncate":
            return
        cut = long & (index.samples["first_label"] < data.text_budget - 1)
        if index.content["num_branched"]:
            cut &= index.samples["num_branches"] == 0
        numbers = np.flatnonzero(cut & (index.samples["num_images"] > 0))
        for start in range(0, len(numbers), _AT_ONCE):
            some = numbers[start : start + _AT_ONCE]
            tiles = self._tiles_before_the_cut(some)
            cut[some] = tiles * self._per_tile <= data.visual_budget
            fewer = np.flatnonzero(tiles < index.samples["num_tiles"][some])
            self._tiles_left.update(zip(some[fewer].tolist(), tiles[fewer].tolist(), strict=True))
        self.cut = cut
        self.left_out &= ~cut

    def fit(self, number: int) -> FittedSample | None:
        """A sample as a step takes it, cut where it has to be; None where it is left out."""
        if self.left_out[number]:
            return None
        return fitted_sample(self._index, number, self._data.text_budget)

    @cached_property
    def rows(self) -> np.ndarray:
        """Int32 [samples, 2], text and visual rows that each takes; (0, 0) if left out."""
        rows = np.empty((len(self._index), 2), np.int32)  # of all samples: kept small
        rows[:, 0] = self._index.samples["text_rows"]
        rows[:, 1] = self._index.samples["num_tiles"]
        for number, tiles in self._tiles_left.items():
            rows[number, 1] = tiles
        rows[:, 1] *= self._per_tile
        rows[self.cut, 0] = self._data.text_budget
        rows[self.left_out | (np.asarray(self._index.usable) != 1)] = 0
        return rows

    def counted_otherwise(self, drawn: np.ndarray) -> bool:
        """Whether full steps of former releases held other samples than today's.

        With `truncate` they counted a sample that was left out as if it were cut, and images
        behind a cut as far as they fit the budget.

        Args:
            drawn: Bool [samples], those that epochs draw.
        """
        data = self._data
        if data.over_budget != "truncate" or data.step_packs_multiple is None:
            return False
        # One that is left out is over a budget, so it counted; it counts 0 today.
        if (self.left_out & drawn).any():
            return True
        whole = self._index.samples["num_tiles"]
        return any(
            drawn[number]
            and tiles * self._per_tile
            != min(int(whole[number]) * self._per_tile, data.visual_budget)
            for number, tiles in self._tiles_left.items()
        )

    def why(self, number: int) -> str:
        """Why a sample is left out: its rows, the budgets, and what cutting it would leave."""
        data, row = self._data, self._index.samples[number]
        text, visual = int(row["text_rows"]), int(row["num_tiles"]) * self._per_tile
        said = (
            f"{text} text and {visual} visual rows; data.text_budget is {data.text_budget}, "
            f"data.visual_budget is {data.visual_budget}"
        )
        if data.over_budget != "truncate":
            return said
        if self._index.content["num_branched"] and row["num_branches"]:
            return f"{said}; a sample with branches is not cut"
        if row["first_label"] >= data.text_budget - 1:
            return f"{said}; cut, it has nothing left to predict"
        left = visual
        if text > data.text_budget:
            left = int(self._tiles_before_the_cut(np.array([number]))[0]) * self._per_tile
        return f"{said}; cut, it still has {left} visual rows"

    def _visual_rows(self) -> np.ndarray:
        return self._index.samples["num_tiles"].astype(np.int64) * self._per_tile

    def _tiles_before_the_cut(self, numbers: np.ndarray) -> np.ndarray:
        """Tiles of the images that stand before the cut of some samples, int64 [numbers]."""
        rows = self._index.samples[numbers]
        counts = rows["num_images"].astype(np.int64)
        behind = np.cumsum(counts)
        of = np.repeat(np.arange(len(numbers)), counts)
        places = np.arange(len(of)) - (behind - counts)[of]
        images = self._index.images[rows["first_image"].astype(np.int64)[of] + places]
        left = images["text_before"] < self._data.text_budget
        tiles = np.where(left, images["num_tiles"], 0).astype(np.int64)
        sums = np.zeros(len(numbers), np.int64)
        np.add.at(sums, of, tiles)
        return sums


def check_trainable(index: Index, config: Config, drawn: np.ndarray, skipped: np.ndarray) -> None:
    """Refuses data of which nothing, or too little, can be trained on.

    Args:
        index: Of the data set.
        config: The run.
        drawn: Numbers of the samples that epochs draw; all of them usable.
        skipped: `Fates.left_out`.

    Raises:
        DataError: With the counts, the first samples that are too long, and the way out.
    """
    data = config.data
    trained = drawn[~skipped[drawn]]
    too_long = drawn[skipped[drawn]]
    counts = (
        f"of {len(index)} samples {len(index) - index.num_usable} are unusable and "
        f"{len(too_long)} over budget (data.over_budget={data.over_budget})"
    )
    if not len(trained):
        raise DataError(
            f"nothing can be trained: {counts}: {_named(index, config, too_long)}; raise "
            f"{_budgets(config)}"
        )
    if not part_learns(config, "llm") and not index.samples["num_tiles"][trained].any():
        groups = " with optim.groups" if config.optim.groups else ""
        raise DataError(
            f"nothing can be trained: train.trains={list(config.train.trains)}{groups} learns from "
            f"images alone, and none of the {len(trained)} samples that can be used has one; add "
            "llm to train.trains, or give other data"
        )
    if data.over_budget == "error":
        return
    if len(too_long) > data.max_skipped_share * len(drawn):
        raise DataError(
            f"{len(too_long)} of {len(drawn)} usable samples are over budget and would be skipped, "
            f"data.max_skipped_share={data.max_skipped_share:g} allows "
            f"{int(data.max_skipped_share * len(drawn))}: {_named(index, config, too_long)}; raise "
            f"{_budgets(config)}, or data.max_skipped_share"
        )


def _budgets(config: Config) -> str:
    data = config.data
    cut = " or set data.over_budget=truncate" if data.over_budget == "skip" else ""
    return f"data.text_budget={data.text_budget} or data.visual_budget={data.visual_budget}{cut}"


def _named(index: Index, config: Config, numbers: np.ndarray) -> str:
    """The first samples with their rows."""
    named = []
    for number in numbers[:_NAMED]:
        row = index.samples[number]
        visual = int(row["num_tiles"]) * config.model.vision.rows_per_tile
        named.append(
            f"{index.name(row)!r} has {int(row['text_rows'])} text and {visual} visual rows"
        )
    more = f", and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else ""
    return ", ".join(named) + more
