"""How many samples, rows and micro-batches a step has."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from dattn_mcore.config.schema import Config
from dattn_mcore.errors import ConfigError
from dattn_mcore.plan.rows import Rows, rows_of


@dataclass(frozen=True)
class Sample:
    """The average sample.

    Attributes:
        text: text rows.
        images: tiles.
        labelled_share: share of text rows that carry a label.
    """

    text: float
    images: float
    labelled_share: float = 1.0


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        rows: of all samples of the global batch.
        pack: rows of an average micro-batch, with `data.fixed_rows` padded.
        num_microbatches: of each data parallel replica.
    """

    rows: Rows
    pack: Rows
    num_microbatches: int


def full_budget_sample(config: Config, images: float = 1.0) -> float:
    """Text rows of a sample with which both budgets of a micro-batch are full."""
    per_tile = config.model.vision.rows_per_tile
    if images == 0:
        return float(config.data.text_budget)
    per_pack = max(1, config.data.visual_budget // round(per_tile * images))
    return config.data.text_budget / per_pack


def step_of(config: Config, sample: Sample, dp: int) -> Step:
    """Packs the global batch as the data pipeline would, with every sample the average one.

    Args:
        config: budgets, global batch, layout.
        sample: the average sample.
        dp: data parallel size.

    Raises:
        ConfigError: a sample fits no micro-batch.
    """
    data, size = config.data, config.train.global_batch_size
    visual = sample.images * config.model.vision.rows_per_tile
    if sample.text > data.text_budget or visual > data.visual_budget:
        raise ConfigError(
            f"a sample of {sample.text:g} text and {visual:g} visual rows does not fit "
            f"data.text_budget={data.text_budget} and data.visual_budget={data.visual_budget}; "
            "raise them or plan with smaller samples"
        )
    fits = [data.text_budget // max(sample.text, 1)]
    if visual:
        fits.append(data.visual_budget // visual)
    packs = -(-size // max(1, int(min(fits))))
    multiple = dp * (config.parallel.pp if config.parallel.vpp > 1 else 1)
    packs = -(-packs // multiple) * multiple
    layout = ((True, round(visual)), (False, round(sample.text)))
    one = rows_of(config, [layout], sample.text * sample.labelled_share)
    rows = dataclasses.replace(one * size, packs=float(packs))
    pack = rows * (1 / packs)
    if data.fixed_rows:  # padding costs as much as what it stands beside
        pack = dataclasses.replace(
            pack,
            text=max(pack.text, data.text_budget),
            visual=max(pack.visual, data.visual_budget),
        )
    return Step(rows, pack, packs // dp)
