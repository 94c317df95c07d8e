"""How many samples, rows and micro-batches a step has."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from dattn_mcore.config.schema import Config
from dattn_mcore.data.steps import MOST_OFF
from dattn_mcore.errors import ConfigError
from dattn_mcore.plan.rows import Rows, rows_of


@dataclass(frozen=True)
class Sample:
    """The average sample.

    Attributes:
        text: text rows.
        images: tiles.
        labelled_share: share of text rows that carry a label.
        per_image: samples of a micro-batch that show the same images, and share their visual rows.
    """

    text: float
    images: float
    labelled_share: float = 1.0
    per_image: float = 1.0

    def computed_share(self, samples: int) -> float:
        """Share of the visual rows of so many samples in a micro-batch that are computed."""
        return math.ceil(samples / self.per_image) / max(samples, 1)


@dataclass(frozen=True)
class DataSize:
    """What is known of the data set; None for what is not.

    Attributes:
        samples: of an epoch.
        steps: of the whole run, counted from the samples' true lengths.
    """

    samples: int | None = None
    steps: int | None = None


@dataclass(frozen=True)
class Step:
    """One optimizer step.

    Attributes:
        samples: of all replicas.
        per_pack: samples that fill a micro-batch.
        needed: micro-batches that the samples fill.
        packs: micro-batches of all replicas; more than that where replicas want their number.
        rows: of all samples.
        pack: rows of the largest micro-batch, with `data.fixed_rows` padded.
        num_microbatches: of each data parallel replica.
    """

    samples: int
    per_pack: int
    needed: int
    packs: int
    rows: Rows
    pack: Rows
    num_microbatches: int

    @property
    def fill(self) -> float:
        """Share of the samples that the micro-batches could hold."""
        return self.samples / (self.packs * self.per_pack)


def full_budget_sample(config: Config, images: float = 1.0) -> float:
    """Text rows of a sample with which both budgets of a micro-batch are full."""
    per_tile = config.model.vision.rows_per_tile
    if images == 0:
        return float(config.data.text_budget)
    per_pack = max(1, config.data.visual_budget // round(per_tile * images))
    return config.data.text_budget / per_pack


def step_of(config: Config, sample: Sample, dp: int) -> Step:
    """Packs the global batch as the data pipeline would, with every sample the average one.

    Samples stay whole: where they cannot be divided evenly, the largest pack sets the pace.

    Args:
        config: budgets, global batch, layout.
        sample: the average sample.
        dp: data parallel size.

    Raises:
        ConfigError: a sample fits no micro-batch.
    """
    size = config.train.global_batch_size
    visual = sample.images * config.model.vision.rows_per_tile
    per_pack = samples_per_pack(config, sample)
    needed, samples = -(-size // per_pack), size
    if (full := full_packs(config, per_pack)) is not None:
        needed, samples = full, full * per_pack
    multiple = pack_multiple(config, dp)
    packs = -(-needed // multiple) * multiple
    layout = ((True, round(visual)), (False, round(sample.text)))
    one = rows_of(config, [layout], sample.text * sample.labelled_share)
    in_pack = -(-samples // packs)
    computed = sample.computed_share(in_pack)
    one = dataclasses.replace(one, visual=one.visual * computed, tiles=one.tiles * computed)
    rows = dataclasses.replace(one * samples, packs=float(packs))
    pack = dataclasses.replace(one * in_pack, packs=1.0)
    if config.data.fixed_rows:  # padding costs as much as what it stands beside
        pack = dataclasses.replace(
            pack,
            text=max(pack.text, config.data.text_budget),
            visual=max(pack.visual, config.data.visual_budget),
        )
    return Step(samples, per_pack, needed, packs, rows, pack, packs // dp)


def samples_per_pack(config: Config, sample: Sample) -> int:
    """Average samples that fill a micro-batch.

    Raises:
        ConfigError: a sample fits none.
    """
    data = config.data
    visual = sample.images * config.model.vision.rows_per_tile
    if sample.text > data.text_budget or visual > data.visual_budget:
        raise ConfigError(
            f"a sample of {sample.text:g} text and {visual:g} visual rows does not fit "
            f"data.text_budget={data.text_budget} and data.visual_budget={data.visual_budget}; "
            "raise them or plan with smaller samples"
        )
    fits = [data.text_budget // max(sample.text, 1)]
    if visual:  # those of an image count once
        fits.append(data.visual_budget // visual * sample.per_image)
    return max(1, int(min(fits)))


def pack_multiple(config: Config, dp: int) -> int:
    """What the micro-batches of a step are a multiple of, for the layout."""
    return dp * (config.parallel.pp if config.parallel.vpp > 1 else 1)


def full_packs(config: Config, per_pack: int) -> int | None:
    """Micro-batches of a step with `data.step_packs_multiple`; None without it.

    None as well where the run would refuse the number with samples of this length.

    Args:
        config: global batch and multiple.
        per_pack: samples that fill a micro-batch.
    """
    multiple = config.data.step_packs_multiple
    if multiple is None:
        return None
    needed = config.train.global_batch_size / per_pack
    packs = max(1, round(needed / multiple)) * multiple
    return packs if abs(packs - needed) <= MOST_OFF * needed else None
