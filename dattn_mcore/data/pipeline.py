"""The data path as the training loop sees it: step in, packed micro-batches out, ahead of time.

Everything but text and pixels is decided by every rank alike from the index and the step, so ranks
never talk about data. A rank reads the text of its own packs only, and only ranks with
`needs_pixels` open their images; where context parallel ranks divide a pack, each opens those of
which it has a tile. A sample that cannot be read or decoded keeps its place and its
shapes: its labels and tiles are blank, and it is among the batch's failures, which the training
loop exchanges, so that every rank that holds the sample masks it (see `failures.mask`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np

from dattn_mcore.config.schema import Config
from dattn_mcore.config.sharing import why_apart
from dattn_mcore.data.batch import GlobalBatch
from dattn_mcore.data.batches import BatchBuilder
from dattn_mcore.data.budgets import check_trainable
from dattn_mcore.data.failures import check_share
from dattn_mcore.data.fitted_sample import FittedSample
from dattn_mcore.data.held_out import held_out_samples
from dattn_mcore.data.index.identity import identity_of
from dattn_mcore.data.index.store import open_index
from dattn_mcore.data.prefetch import Prefetcher
from dattn_mcore.data.run_order import order_of_run
from dattn_mcore.data.sample_failure import SampleFailure
from dattn_mcore.data.share import RankShare
from dattn_mcore.data.steps import FullSteps, shares_of, steps_of
from dattn_mcore.data.templates import check_symbols
from dattn_mcore.data.tokenizer import Tokenizer
from dattn_mcore.errors import ConfigError

_LOG = logging.getLogger(__name__)


class DataPipeline:
    """Global batches of one data-parallel rank, deterministic in the step.

    A thread prepares `data.prefetch` steps ahead, in order; it starts again when the step jumps.

    Attributes:
        index: Of the data set.
        order: Of its samples.
        steps: Which positions of the order a step takes.
        held_out: Samples of the index that are kept for validation, or away from both sides.
        drawn: Bool [samples of the index], those that epochs draw.
        num_samples: Samples of an epoch.
        num_trainable: Samples that epochs draw and that fit a micro-batch.
        groups: (source, kind) of each group of samples (`batches.groups_of`).
        identity: What the order and content of samples depend on (`data/index/identity.py`).
        tokenizer_fingerprint: SHA-256 of what defines the tokenizer.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        *,
        dp_rank: int,
        dp_size: int,
        microbatch_multiple: int,
        needs_pixels: bool,
        image_device: str = "cpu",
        image_device_id: int | None = None,
        tile_rank: int = 0,
        tile_ranks: int = 1,
    ) -> None:
        """Opens the index (makes it where it is absent or stale); opens no image yet.

        Args:
            config: The run, checked.
            tokenizer: From `load_tokenizer(config.data.tokenizer)`.
            dp_rank: See `RankShare`, as all below.
            dp_size: Likewise.
            microbatch_multiple: Likewise.
            needs_pixels: Likewise.
            image_device: Likewise.
            image_device_id: Likewise.
            tile_rank: Likewise.
            tile_ranks: Likewise.

        Raises:
            DataError: A source is missing or malformed, too many of its samples are unusable or
                over budget, or nothing can be trained.
            ConfigError: A setting of `data` that cannot run.
        """
        data = config.data
        self.share = RankShare(
            dp_rank=dp_rank,
            dp_size=dp_size,
            microbatch_multiple=microbatch_multiple,
            needs_pixels=needs_pixels,
            image_device=image_device,
            image_device_id=image_device_id,
            tile_rank=tile_rank,
            tile_ranks=tile_ranks,
        )
        check_symbols(tokenizer, data.template)
        if tokenizer.vocab_size > config.model.llm.vocab_size:
            raise ConfigError(
                f"model.llm.vocab_size ({config.model.llm.vocab_size}) is smaller than the "
                f"tokenizer's {tokenizer.vocab_size} ids (data.tokenizer '{data.tokenizer}'); "
                "raise it"
            )
        self.index = open_index(config, tokenizer)
        check_share(self.index, data.max_bad_share)
        self.held_out = held_out_samples(self.index, config)
        away = None if self.held_out is None else self.held_out.away
        shares = shares_of(self.index, away)
        self._batches = BatchBuilder(
            config,
            self.index,
            tokenizer,
            self.share,
            by_group=len(self.index.settings.sources) > 1,  # else nobody reads it
        )
        if self.index.content["num_images"] and (reason := why_apart(config)) is not None:
            _LOG.info("every sample has visual rows of its own: %s", reason)
        fates = self._batches.fates
        drawn = np.concatenate([share.numbers for share in shares if share.per_epoch])
        check_trainable(self.index, config, drawn, fates.left_out)
        self.num_trainable = int((~fates.left_out[drawn]).sum())
        self.drawn = np.zeros(len(self.index), bool)
        self.drawn[drawn] = True
        self.order = order_of_run(config, self.index, shares)
        self.steps = steps_of(config, self.order, fates)
        if isinstance(self.steps, FullSteps):
            self._describe_steps(self.steps)
        self.num_samples = self.order.epoch_size
        self.groups = self._batches.groups
        self.identity = identity_of(
            self.index,
            data,
            config.validation,
            cut_rows=fates.counted_otherwise(self.drawn),
        )
        self.tokenizer_fingerprint = tokenizer.fingerprint
        self._prefetcher = Prefetcher(self._build, data.prefetch)

    def global_batch(self, step: int) -> GlobalBatch:
        """Returns this rank's part of optimizer step `step` (0-based).

        Raises:
            DataError: A sample over budget with `data.over_budget=error`.
        """
        return self._prefetcher.get(step)

    def __iter__(self) -> Iterator[GlobalBatch]:
        """Yields the global batches of steps 0, 1, 2, ... without end."""
        step = 0
        while True:
            yield self.global_batch(step)
            step += 1

    def close(self) -> None:
        """Ends the threads."""
        self._prefetcher.close()
        self._batches.close()

    def samples_of(self, step: int) -> tuple[list[int], list[FittedSample], list[SampleFailure]]:
        """The samples of a step, from the index alone.

        Returns:
            Numbers of its samples in order; those that take part; those that fit no micro-batch.

        Raises:
            DataError: One of the latter, with `data.over_budget=error`.
        """
        numbers = self.order.numbers(*self.steps.bounds(step))
        return numbers, *self._batches.fit(numbers)

    def _build(self, step: int) -> GlobalBatch:
        return self._batches.build(step, self.order.numbers(*self.steps.bounds(step)))

    def _describe_steps(self, steps: FullSteps) -> None:
        """Says how full the packs of a step are, and whether the ranks can divide them evenly."""
        _LOG.info(
            "a step is %d packs, %.0f %% full: %d samples in the first one",
            steps.packs,
            100 * steps.fill,
            steps.bounds(0)[1],
        )
        if steps.packs % self.share.pack_multiple:
            _LOG.warning(
                "%d packs cannot be divided evenly: they are rounded up to a multiple of %d, "
                "and less full; set data.step_packs_multiple to a multiple of it",
                steps.packs,
                self.share.pack_multiple,
            )
