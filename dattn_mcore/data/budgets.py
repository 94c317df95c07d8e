"""Which samples fit no micro-batch, and whether what is left can train the model.

The index knows the rows of every sample, so both are known before the first step.
"""

from __future__ import annotations

import numpy as np

from dattn_mcore.config.optim_groups import part_learns
from dattn_mcore.config.schema import Config
from dattn_mcore.data.index.store import Index
from dattn_mcore.errors import DataError

_NAMED = 3  # in an error's one line


def skipped_samples(index: Index, config: Config) -> np.ndarray:
    """Whether each sample of an index is left out for its length, bool [samples].

    With `data.over_budget=truncate` text is cut at the end, and images behind the cut go with it.
    A sample that still fits no pack, has nothing left to predict, or has branches is left out even
    then. With `error` the run ends at the first of them.
    """
    data = config.data
    text, visual = index.samples["text_rows"], _visual_rows(index, config)
    over = (text > data.text_budget) | (visual > data.visual_budget)
    over &= np.asarray(index.usable) == 1
    if data.over_budget != "truncate":
        return over
    left_out = over & (index.samples["first_label"] >= data.text_budget - 1)
    if index.content["num_branched"]:
        left_out |= over & (index.samples["num_branches"] > 0)
    most_tiles = data.visual_budget // config.model.vision.rows_per_tile
    for number in np.flatnonzero(over & ~left_out & (visual > data.visual_budget)):
        row = index.samples[number]
        first, count = int(row["first_image"]), int(row["num_images"])
        images = index.images[first : first + count]
        tiles = images["num_tiles"].astype(np.int64)
        if row["text_rows"] > data.text_budget:
            tiles = tiles[images["text_before"] < data.text_budget]
        left_out[number] = tiles.sum() > most_tiles
    return left_out


def check_trainable(index: Index, config: Config, drawn: np.ndarray, skipped: np.ndarray) -> None:
    """Refuses data of which nothing, or too little, can be trained on.

    Args:
        index: Of the data set.
        config: The run.
        drawn: Numbers of the samples that epochs draw; all of them usable.
        skipped: From `skipped_samples`.

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


def _visual_rows(index: Index, config: Config) -> np.ndarray:
    return index.samples["num_tiles"].astype(np.int64) * config.model.vision.rows_per_tile


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
