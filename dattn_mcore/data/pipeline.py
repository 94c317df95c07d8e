"""The data path as the training loop sees it: step in, packed micro-batches out, ahead of time.

Everything but text and pixels is decided by every rank alike from the index and the step, so ranks
never talk about data. A rank reads the text of its own packs only, and only ranks with
`needs_pixels` open their images. A sample that cannot be read or decoded keeps its place and its
shapes: its labels and tiles are blank, and it is among the batch's failures, which the training
loop exchanges, so that every rank that holds the sample masks it (see `failures.mask`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dattn_mcore.config.schema import Config
from dattn_mcore.data.balance import row_work, split_over_ranks
from dattn_mcore.data.batch import GlobalBatch, MicroBatch
from dattn_mcore.data.budgets import check_trainable, skipped_samples
from dattn_mcore.data.failures import SampleFailure, check_share
from dattn_mcore.data.images import ImageLoader
from dattn_mcore.data.index.identity import identity_of
from dattn_mcore.data.index.store import open_index
from dattn_mcore.data.order import SampleOrder
from dattn_mcore.data.packing import Pack, make_packs
from dattn_mcore.data.prefetch import Prefetcher
from dattn_mcore.data.samples import FittedSample, SampleReader
from dattn_mcore.data.steps import FullSteps, shares_of, steps_of
from dattn_mcore.data.templates import EncodedSample, check_symbols
from dattn_mcore.data.tokenizer import Tokenizer
from dattn_mcore.errors import ConfigError, DataError

_LOG = logging.getLogger(__name__)


class DataPipeline:
    """Global batches of one data-parallel rank, deterministic in the step.

    A thread prepares `data.prefetch` steps ahead, in order; it starts again when the step jumps.

    Attributes:
        index: Of the data set.
        order: Of its samples.
        steps: Which positions of the order a step takes.
        num_samples: Samples of an epoch.
        num_trainable: Samples that epochs draw and that fit a micro-batch.
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
    ) -> None:
        """Opens the index (makes it where it is absent or stale); opens no image yet.

        Args:
            config: The run, checked.
            tokenizer: From `load_tokenizer(config.data.tokenizer)`.
            dp_rank: This rank's place in its data-parallel group.
            dp_size: Size of that group.
            microbatch_multiple: The count of micro-batches is a multiple of this (interleaved
                schedules want a multiple of pp).
            needs_pixels: Whether this rank runs the vision tower.
            image_device: `gpu` decodes on the GPU; `MicroBatch.tiles` then lie there.
            image_device_id: Index of that GPU.

        Raises:
            DataError: A source is missing or malformed, too many of its samples are unusable or
                over budget, or nothing can be trained.
            ConfigError: A setting of `data` that cannot run.
        """
        data, vision = config.data, config.model.vision
        self._config = config
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._multiple = dp_size * microbatch_multiple
        self._rows_per_tile = vision.rows_per_tile
        check_symbols(tokenizer, data.template)
        if tokenizer.vocab_size > config.model.llm.vocab_size:
            raise ConfigError(
                f"model.llm.vocab_size ({config.model.llm.vocab_size}) is smaller than the "
                f"tokenizer's {tokenizer.vocab_size} ids (data.tokenizer '{data.tokenizer}'); "
                "raise it"
            )
        self.index = open_index(config, tokenizer)
        check_share(self.index, data.max_bad_share)
        shares = shares_of(self.index)
        self._skipped = skipped_samples(self.index, config)
        drawn = np.concatenate([share.numbers for share in shares if share.per_epoch])
        check_trainable(self.index, config, drawn, self._skipped)
        self.num_trainable = int((~self._skipped[drawn]).sum())
        self.order = SampleOrder(shares, config.train.seed)
        self.steps = steps_of(config, self.index, self.order)
        if isinstance(self.steps, FullSteps):
            _LOG.info(
                "a step is %d packs, %.0f %% full: %d samples in the first one",
                self.steps.packs,
                100 * self.steps.fill,
                self.steps.bounds(0)[1],
            )
            if self.steps.packs % self._multiple:
                _LOG.warning(
                    "%d packs cannot be divided evenly: they are rounded up to a multiple of %d, "
                    "and less full; set data.step_packs_multiple to a multiple of it",
                    self.steps.packs,
                    self._multiple,
                )
        self.num_samples = self.order.epoch_size
        self.identity = identity_of(self.index, data)
        self.tokenizer_fingerprint = tokenizer.fingerprint
        self._reader = SampleReader(
            self.index, tokenizer, self._rows_per_tile, data.max_image_pixels
        )
        self._images: ImageLoader | None = None
        if needs_pixels and self.index.content["num_images"]:
            self._reader.check_folders()
            self._images = ImageLoader.of(config, image_device, image_device_id)
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
        if self._images is not None:
            self._images.close()
        self._reader.close()

    def samples_of(self, step: int) -> tuple[list[int], list[FittedSample], list[SampleFailure]]:
        """The samples of a step, from the index alone.

        Returns:
            Numbers of its samples in order; those that take part; those that fit no micro-batch.

        Raises:
            DataError: One of the latter, with `data.over_budget=error`.
        """
        numbers = self.order.numbers(*self.steps.bounds(step))
        rows = self.index.samples[np.array(numbers)]
        fitted, skipped = [], []
        for number, row in zip(numbers, rows, strict=True):
            found = self._fit(number, row)
            if isinstance(found, FittedSample):
                fitted.append(found)
            else:
                skipped.append(found)
        return numbers, fitted, skipped

    def _build(self, step: int) -> GlobalBatch:
        """Makes one global batch, start to end."""
        self._reader.make_room()
        numbers, fitted, skipped = self.samples_of(step)
        data = self._config.data
        budgets = (data.text_budget, data.visual_budget)
        lengths = [(item.text_rows, item.num_tiles * self._rows_per_tile) for item in fitted]
        packs = make_packs(lengths, *budgets, self._multiple)
        work = row_work(self._config)
        mine = split_over_ranks(packs, lengths, self._dp_size, budgets, work)[self._dp_rank]
        failures: list[SampleFailure] = []
        tiles = self._tiles([fitted[index] for pack in mine for index in pack], failures)
        return GlobalBatch(
            step=step,
            microbatches=[self._micro_batch(fitted, pack, tiles, failures) for pack in mine],
            samples=tuple(numbers),
            sample_ids=tuple(self.index.ids(numbers)),
            skipped=tuple(skipped),
            truncated=tuple(
                item.indexed.id for item in fitted if item.text_rows < item.indexed.text_rows
            ),
            failures=tuple(failures),
            text_tokens=sum(text for text, _ in lengths),
            visual_tokens=sum(visual for _, visual in lengths),
        )

    def _fit(self, number: int, row: np.void) -> FittedSample | SampleFailure:
        """Applies `data.over_budget` to a sample that fits no pack (see `skipped_samples`)."""
        data = self._config.data
        if not self._skipped[number]:
            cuts = data.over_budget == "truncate"
            return self._reader.fit(number, data.text_budget if cuts else None)
        name = self.index.name(self.index.samples[number])
        text, visual = int(row["text_rows"]), int(row["num_tiles"]) * self._rows_per_tile
        reason = (
            f"{text} text and {visual} visual rows; data.text_budget is {data.text_budget}, "
            f"data.visual_budget is {data.visual_budget}"
        )
        if data.over_budget == "error":
            raise DataError(
                f"annotation {name!r} has {reason}; raise them or set data.over_budget=skip"
            )
        return SampleFailure(sample=number, id=name, path=None, stage="budget", reason=reason)

    def _tiles(self, fitted: list[FittedSample], failures: list[SampleFailure]) -> Iterator[Tensor]:
        """Loads the images of a rank's packs together; yields the tiles of each sample in order."""
        if self._images is None:
            return iter(())
        shown = [(item.indexed, image) for item in fitted for image in item.images]
        tiles, bad = self._images.load([self._reader.request(*pair) for pair in shown])
        for failure in bad:
            sample, image = shown[failure.index]
            failures.append(
                SampleFailure(
                    sample=sample.number,
                    id=sample.id,
                    path=image.place.name,
                    stage=failure.stage,
                    reason=failure.reason,
                )
            )
        return iter(tiles.split([item.num_tiles for item in fitted]))

    def _micro_batch(
        self,
        fitted: list[FittedSample],
        pack: Pack,
        tiles: Iterator[Tensor],
        failures: list[SampleFailure],
    ) -> MicroBatch:
        """Concatenates the samples of a pack."""
        members = [fitted[index] for index in pack]
        encoded = [self._encode(item, failures) for item in members]
        pixels = [next(tiles) for _ in members] if self._images is not None else []
        num_tiles = sum(item.num_tiles for item in members)
        return MicroBatch(
            layouts=tuple(item.layout for item in encoded),
            text_ids=torch.tensor([i for e in encoded for i in e.text_ids], dtype=torch.int64),
            labels=torch.tensor([i for e in encoded for i in e.labels], dtype=torch.int64),
            num_tiles=num_tiles,
            tiles=torch.cat(pixels) if pixels and num_tiles else None,
            samples=tuple(item.indexed.number for item in members),
            sample_ids=tuple(item.indexed.id for item in members),
            num_samples=len(members),
            image_grids=tuple(image.grid for item in members for image in item.images),
        )

    def _encode(self, fitted: FittedSample, failures: list[SampleFailure]) -> EncodedSample:
        """Reads a sample's text; one that cannot be read any more is blank and a failure."""
        try:
            return self._reader.encode(fitted)
        except (DataError, OSError) as error:
            indexed = fitted.indexed
            failures.append(
                SampleFailure(
                    indexed.number, indexed.id, None, "read", f"annotation {indexed.id!r}: {error}"
                )
            )
            return self._reader.blank(fitted)
