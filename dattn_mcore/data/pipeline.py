"""The data path as the training loop sees it: step in, packed micro-batches out, ahead of time.

Everything but the pixels is computed by every rank alike from the annotations and the step, so
ranks never talk about data. Only ranks with `needs_pixels` open image files, and only those of
their own packs.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from dattn_mcore.config.schema import Config
from dattn_mcore.data.annotations import Sample, read_annotations
from dattn_mcore.data.batch import GlobalBatch, Layout, MicroBatch
from dattn_mcore.data.images import ImageLoader
from dattn_mcore.data.order import SampleOrder
from dattn_mcore.data.packing import Pack, plan_packs, split_over_ranks
from dattn_mcore.data.templates import (
    NO_LOSS,
    EncodedSample,
    check_template,
    encode_conversation,
    encode_sample,
    truncate,
)
from dattn_mcore.data.tiles import Grid
from dattn_mcore.data.tokenizer import Tokenizer
from dattn_mcore.data.views import ViewPlanner
from dattn_mcore.errors import ConfigError, DataError

__all__ = ["DataPipeline", "GlobalBatch", "Layout", "MicroBatch"]

_LOG = logging.getLogger(__name__)
OVER_BUDGET = ("skip", "truncate", "error")


@dataclass(frozen=True)
class _Entry:
    """A sample that takes part in a step."""

    sample: Sample
    encoded: EncodedSample
    grids: tuple[Grid, ...]  # of the images that stand in it


class DataPipeline:
    """Global batches of one data-parallel rank, deterministic in the step.

    A thread prepares `data.prefetch` steps ahead, in order; it starts again when the step jumps.
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
        """Reads and checks the annotations; opens no image yet.

        Args:
            config: The run; `data`, `model.vision`, `model.llm.vocab_size`, `train` are read.
            tokenizer: From `load_tokenizer(config.data.tokenizer)`.
            dp_rank: This rank's place in its data-parallel group.
            dp_size: Size of that group.
            microbatch_multiple: The count of micro-batches is a multiple of this (interleaved
                schedules want a multiple of pp).
            needs_pixels: Whether this rank runs the vision tower.
            image_device: `gpu` decodes on the GPU; `MicroBatch.tiles` then lie there.
            image_device_id: Index of that GPU.

        Raises:
            DataError: Annotations or image folder missing or malformed.
            ConfigError: A setting of `data` that cannot run.
        """
        data = config.data
        self._config = config
        self._tokenizer = tokenizer
        self._dp_rank, self._dp_size = dp_rank, dp_size
        self._multiple = dp_size * microbatch_multiple
        check_template(data.template)
        if data.over_budget not in OVER_BUDGET:
            raise ConfigError(
                f"data.over_budget: '{data.over_budget}' is unknown; use {', '.join(OVER_BUDGET)}"
            )
        if data.text_budget < 1 or data.visual_budget < 1:
            raise ConfigError(
                f"data.text_budget ({data.text_budget}) and data.visual_budget "
                f"({data.visual_budget}) must be at least 1 row"
            )
        if tokenizer.vocab_size > config.model.llm.vocab_size:
            raise ConfigError(
                f"model.llm.vocab_size ({config.model.llm.vocab_size}) is smaller than the "
                f"tokenizer's {tokenizer.vocab_size} ids (data.tokenizer '{data.tokenizer}'); "
                "raise it"
            )
        vision = config.model.vision
        annotations = read_annotations(data.annotations)
        self._samples = annotations.samples
        self.num_samples = len(self._samples)
        _check_samples(self._samples, data.annotations, data.template, tokenizer)
        self._order = SampleOrder(self.num_samples, config.train.seed)
        parts = (annotations.fingerprint, tokenizer.fingerprint, data.template)
        self.fingerprint = hashlib.sha256("\n".join(parts).encode()).hexdigest()
        has_images = any(sample.images for sample in self._samples)
        self._views = ViewPlanner(config, has_images)
        self._images: ImageLoader | None = None
        if needs_pixels and has_images:
            self._images = ImageLoader(
                data.image_folder,
                size=vision.image_size,
                policy=data.image_policy,
                grids=data.anyres_grids,
                mean=data.image_mean,
                backend=data.image_backend,
                threads=data.decode_threads,
                max_pixels=data.max_image_pixels,
                device=image_device,
                device_id=image_device_id,
            )
        self._prefetcher = _Prefetcher(self._build, data.prefetch)

    def global_batch(self, step: int) -> GlobalBatch:
        """Returns this rank's part of optimizer step `step` (0-based).

        Raises:
            DataError: A bad image among this rank's packs, or a sample over budget with
                `data.over_budget=error`.
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
        self._views.close()
        if self._images is not None:
            self._images.close()

    def _build(self, step: int) -> GlobalBatch:
        """Makes one global batch, start to end."""
        size = self._config.train.global_batch_size
        chosen = [self._samples[index] for index in self._order.indexes(step, size)]
        entries, skipped, truncated = self._fit(chosen)
        data = self._config.data
        lengths = [(len(entry.encoded.text_ids), entry.encoded.visual_rows) for entry in entries]
        packs = plan_packs(lengths, data.text_budget, data.visual_budget, self._multiple)
        mine = split_over_ranks(packs, lengths, self._dp_size)[self._dp_rank]
        return GlobalBatch(
            step=step,
            microbatches=[self._micro_batch(entries, pack) for pack in mine],
            sample_ids=tuple(sample.id for sample in chosen),
            skipped=tuple(skipped),
            truncated=tuple(truncated),
            text_tokens=sum(text for text, _ in lengths),
            visual_tokens=sum(visual for _, visual in lengths),
        )

    def _fit(self, chosen: list[Sample]) -> tuple[list[_Entry], list[str], list[str]]:
        """Encodes samples and applies `data.over_budget` to those that fit no pack.

        `truncate` cuts the text at the end. A sample that still fits no pack (its images alone
        are too many) or has nothing left to predict is skipped even then.
        """
        data = self._config.data
        entries: list[_Entry] = []
        skipped: list[str] = []
        truncated: list[str] = []
        for sample, grids in zip(chosen, self._views.grids(chosen), strict=True):
            runs = encode_conversation(self._tokenizer, data.template, sample.turns)
            encoded = encode_sample(runs, [self._views.rows(grid) for grid in grids])
            if self._fits(encoded):
                entries.append(_Entry(sample, encoded, grids))
                continue
            if data.over_budget == "error":
                raise DataError(
                    f"annotation {sample.id!r} has {len(encoded.text_ids)} text and "
                    f"{encoded.visual_rows} visual rows; data.text_budget is {data.text_budget}, "
                    f"data.visual_budget is {data.visual_budget}; raise them or set "
                    "data.over_budget=skip"
                )
            if data.over_budget == "truncate":
                cut = truncate(encoded, data.text_budget)
                if self._fits(cut) and any(label != NO_LOSS for label in cut.labels):
                    entries.append(_Entry(sample, cut, grids[: cut.num_images]))
                    truncated.append(sample.id)
                    continue
            skipped.append(sample.id)
        return entries, skipped, truncated

    def _fits(self, encoded: EncodedSample) -> bool:
        data = self._config.data
        return (
            len(encoded.text_ids) <= data.text_budget and encoded.visual_rows <= data.visual_budget
        )

    def _micro_batch(self, entries: list[_Entry], pack: Pack) -> MicroBatch:
        """Concatenates the samples of a pack and loads their images if this rank needs them."""
        members = [entries[index] for index in pack]
        ids = [index for entry in members for index in entry.encoded.text_ids]
        labels = [label for entry in members for label in entry.encoded.labels]
        shown = [
            (entry.sample.id, path)
            for entry in members
            for path in entry.sample.images[: entry.encoded.num_images]
        ]
        grids = tuple(grid for entry in members for grid in entry.grids)
        tiles = self._images.load(shown, grids) if self._images is not None and shown else None
        return MicroBatch(
            layouts=tuple(entry.encoded.layout for entry in members),
            text_ids=torch.tensor(ids, dtype=torch.int64),
            labels=torch.tensor(labels, dtype=torch.int64),
            num_tiles=sum(1 + columns * rows for columns, rows in grids),
            tiles=tiles,
            sample_ids=tuple(entry.sample.id for entry in members),
            num_samples=len(members),
            image_grids=grids,
        )


def _check_samples(samples: list[Sample], path: str, template: str, tokenizer: Tokenizer) -> None:
    """Fails before the first step where a template cannot hold a sample or a tokenizer."""
    encode_conversation(tokenizer, template, ("", ""))  # lacks the tokenizer a special token?
    if template != "plain":
        return
    for index, sample in enumerate(samples):
        if len(sample.turns) != 2:
            raise DataError(
                f"data.annotations: '{path}' record {index} (id {sample.id!r}) has "
                f"{len(sample.turns)} turns; data.template 'plain' takes one question and one "
                "answer, use a chat template"
            )


class _Prefetcher:
    """Builds global batches ahead of time in one thread, in order of steps."""

    def __init__(self, build: Callable[[int], GlobalBatch], depth: int) -> None:
        self._build = build
        self._depth = depth
        self._worker: _Worker | None = None

    def get(self, step: int) -> GlobalBatch:
        """Returns the batch of `step`, or raises what its making raised."""
        if self._depth < 1:
            return self._build(step)
        if self._worker is None or self._worker.next_step != step:
            self.close()
            self._worker = _Worker(self._build, step, self._depth)
        try:
            return self._worker.take()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stops the thread; what it prepared is dropped."""
        if self._worker is not None:
            self._worker.stop()
            self._worker = None


class _Worker:
    """One run of the thread, from one step on, until it is stopped or building fails."""

    def __init__(self, build: Callable[[int], GlobalBatch], step: int, depth: int) -> None:
        self.next_step = step
        self._build = build
        self._depth = depth
        self._ready: deque[GlobalBatch | BaseException] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(
            target=self._run, args=(step,), name="prefetch", daemon=True
        )
        self._thread.start()

    def take(self) -> GlobalBatch:
        """Waits for the next batch."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready)
            item = self._ready.popleft()
            self._changed.notify_all()
        if isinstance(item, BaseException):
            raise item
        self.next_step += 1
        return item

    def stop(self) -> None:
        """Ends the thread, after the batch it is at."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self, step: int) -> None:
        while not self._stopped:
            item: GlobalBatch | BaseException
            try:
                item = self._build(step)
            except BaseException as error:  # noqa: BLE001  (raised again where it is asked for)
                item = error
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or len(self._ready) < self._depth)
                self._ready.append(item)
                self._changed.notify_all()
            if isinstance(item, BaseException):
                return
            step += 1
