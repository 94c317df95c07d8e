"""From the numbers of samples to one rank's packed micro-batches: fitted, packed, read, decoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from dattn_mcore.config.schema import Config
from dattn_mcore.config.sharing import why_apart
from dattn_mcore.data.balance import pack_rows, row_work, split_over_ranks
from dattn_mcore.data.batch import GlobalBatch, MicroBatch
from dattn_mcore.data.budgets import Fates
from dattn_mcore.data.fitted_sample import FittedSample
from dattn_mcore.data.images import ImageLoader
from dattn_mcore.data.index.store import Index
from dattn_mcore.data.sample_failure import SampleFailure
from dattn_mcore.data.samples import SampleReader
from dattn_mcore.data.share import RankShare
from dattn_mcore.data.shared_images import first_of_units, images_of, units_of
from dattn_mcore.data.shared_packing import make_shared_packs
from dattn_mcore.data.templates import EncodedSample
from dattn_mcore.data.tokenizer import Tokenizer
from dattn_mcore.errors import DataError
from dattn_mcore.types import image_shapes

T = TypeVar("T")


@dataclass(frozen=True)
class PackMembers:
    """What a pack is made of.

    Attributes:
        samples: In order.
        units: For each the number of its visual unit in the global batch.
    """

    samples: list[FittedSample]
    units: list[int]

    @cached_property
    def firsts(self) -> list[int]:
        """Places of the samples whose images are loaded: the first of each unit."""
        return first_of_units(self.units)

    @property
    def num_tiles(self) -> int:
        """Tiles, those of a unit once."""
        return sum(self.samples[first].num_tiles for first in self.firsts)

    def images_with(self, own: range) -> Iterator[tuple[int, int, range]]:
        """The images that have some tiles of the pack.

        Args:
            own: Which tiles of the pack.

        Yields:
            One of `firsts`, an image's place in its sample, and which of the image's tiles they
            are; in order.
        """
        start = 0
        for first in self.firsts:
            for place, image in enumerate(self.samples[first].images):
                low, high = max(own.start - start, 0), min(own.stop - start, image.num_tiles)
                if low < high:
                    yield first, place, range(low, high)
                start += image.num_tiles

    def sharing(self, first: int) -> list[FittedSample]:
        """The samples that show the images of one of `firsts`, this one included."""
        shown = self.units[first]
        return [item for item, unit in zip(self.samples, self.units, strict=True) if unit == shown]


class BatchBuilder:
    """Builds this rank's part of a global batch from the numbers of its samples.

    Args:
        config: The run, checked.
        index: That the numbers refer to.
        tokenizer: The one it was made with.
        share: Which part of a batch this rank takes.
        by_group: Whether losses are counted by groups, too.

    Attributes:
        fates: Which samples are cut, and which fit no micro-batch.
        groups: Names of the groups that losses are counted by: of each source the samples with
            images, then those of text alone.
    """

    def __init__(
        self,
        config: Config,
        index: Index,
        tokenizer: Tokenizer,
        share: RankShare,
        *,
        by_group: bool,
    ) -> None:
        data, vision = config.data, config.model.vision
        self._config, self._index, self._share = config, index, share
        self._rows_per_tile = vision.rows_per_tile
        self._shares_images = why_apart(config) is None
        self.fates = Fates(index, config)
        self.groups, self._by_group = groups_of(index), by_group
        self._source_ends = np.array([end for _, end in index.source_ranges()])
        self._reader = SampleReader(index, tokenizer, self._rows_per_tile, data.max_image_pixels)
        self._images: ImageLoader | None = None
        if share.needs_pixels and index.content["num_images"]:
            self._reader.check_folders()
            self._images = ImageLoader.of(config, share.image_device, share.image_device_id)

    def close(self) -> None:
        """Ends the threads; only when no batch is being built."""
        if self._images is not None:
            self._images.close()
        self._reader.close()

    def fit(self, numbers: Sequence[int]) -> tuple[list[FittedSample], list[SampleFailure]]:
        """Divides samples into those that take part and those that fit no micro-batch.

        Raises:
            DataError: One of the latter, with `data.over_budget=error`.
        """
        fitted, skipped = [], []
        for number in numbers:
            found = self._fit(number)
            if isinstance(found, FittedSample):
                fitted.append(found)
            else:
                skipped.append(found)
        return fitted, skipped

    def build(self, step: int, numbers: Sequence[int]) -> GlobalBatch:
        """Makes one global batch, start to end.

        Args:
            step: Its number.
            numbers: Of its samples, in order.

        Raises:
            DataError: A sample over budget with `data.over_budget=error`.
        """
        self._reader.make_room()
        fitted, skipped = self.fit(numbers)
        data = self._config.data
        budgets = (data.text_budget, data.visual_budget)
        lengths = [(item.text_rows, item.num_tiles * self._rows_per_tile) for item in fitted]
        units = units_of(fitted, shares=self._shares_images)
        packs = make_shared_packs(lengths, units, budgets, self._share.pack_multiple)
        work = row_work(self._config)
        share = self._share
        shares = split_over_ranks(packs, lengths, share.dp_size, budgets, work, units)
        mine = [
            PackMembers([fitted[i] for i in pack], [units[i] for i in pack])
            for pack in shares[share.dp_rank]
        ]
        failures: list[SampleFailure] = []
        tiles = self._tiles(mine, failures)
        return GlobalBatch(
            step=step,
            microbatches=[self._micro_batch(pack, tiles, failures) for pack in mine],
            samples=tuple(numbers),
            sample_ids=tuple(self._index.ids(numbers)),
            skipped=tuple(skipped),
            truncated=tuple(
                item.indexed.id for item in fitted if item.text_rows < item.indexed.text_rows
            ),
            failures=tuple(failures),
            text_tokens=sum(text for text, _ in lengths),
            visual_tokens=sum(
                pack_rows(pack, lengths, units)[1] for of_rank in shares for pack in of_rank
            ),
        )

    def _fit(self, number: int) -> FittedSample | SampleFailure:
        """Applies `data.over_budget` to a sample that fits no pack."""
        fitted = self.fates.fit(number)
        if fitted is not None:
            return fitted
        sample, reason = self._index.sample(number), self.fates.why(number)
        if self._config.data.over_budget == "error":
            said = f"annotation {sample.id!r} has {reason}"
            failure = self._reader.failure(sample, "budget", said)
            raise DataError(f"{failure.reason}; raise them or set data.over_budget=skip")
        # Every rank comes here with every sample that is left out; it is no reason to read files.
        return self._reader.failure(sample, "budget", reason, counted=False)

    def _tiles(
        self, packs: Sequence[PackMembers], failures: list[SampleFailure]
    ) -> Iterator[Tensor]:
        """Loads the images of a rank's packs together; yields its tiles of each pack in order.

        Images of which it has no tile are not opened. An image that fails is a failure of every
        sample of its pack that shows it.
        """
        if self._images is None:
            return iter(())
        shown, requests = [], []
        for pack in packs:
            own = self._share.own_tiles(pack.num_tiles)
            for unit, place, wanted in pack.images_with(own):
                sample = pack.samples[unit]
                request = self._reader.request(sample.indexed, sample.images[place])
                shown.append((pack, unit, place))
                requests.append(replace(request, wanted=wanted))
        tiles, bad = self._images.load(requests)
        for failure in bad:
            pack, unit, place = shown[failure.index]
            failures += [
                self._reader.failure(
                    item.indexed,
                    failure.stage,
                    failure.reason.replace(requests[failure.index].who, self._who(item, place)),
                    item.images[place],
                )
                for item in pack.sharing(unit)
            ]
        return iter(tiles.split([len(self._share.own_tiles(pack.num_tiles)) for pack in packs]))

    def _who(self, item: FittedSample, place: int) -> str:
        """How a message names an image of a sample."""
        return self._reader.request(item.indexed, item.images[place]).who

    def _micro_batch(
        self, pack: PackMembers, tiles: Iterator[Tensor], failures: list[SampleFailure]
    ) -> MicroBatch:
        """Concatenates the samples of a pack."""
        texts = [self._encode(item, failures) for item in pack.samples]
        # A branch is a sample to the model: it shares the images of its sample's other branches.
        encoded = [one for of_sample in texts for one in of_sample]
        times = [len(of_sample) for of_sample in texts]
        members = _repeated(pack.samples, times)
        pixels = next(tiles) if self._images is not None else None
        weights = tuple(item.weight for item in encoded)
        return MicroBatch(
            layouts=tuple(item.layout for item in encoded),
            text_ids=torch.tensor([i for e in encoded for i in e.text_ids], dtype=torch.int64),
            labels=torch.tensor([i for e in encoded for i in e.labels], dtype=torch.int64),
            num_tiles=pack.num_tiles,
            tiles=pixels if pack.num_tiles else None,
            samples=tuple(item.indexed.number for item in members),
            sample_ids=tuple(item.indexed.id for item in members),
            num_samples=len(pack.samples),
            items=image_shapes(
                image.grid for first in pack.firsts for image in pack.samples[first].images
            ),
            groups=tuple(self._group(item) for item in members) if self._by_group else (),
            num_groups=len(self.groups) if self._by_group else 0,
            images_of=images_of(_repeated(pack.units, times)),
            weights=weights if any(weight != 1 for weight in weights) else (),
        )

    def _group(self, fitted: FittedSample) -> int:
        """Place in `groups`."""
        source = int(np.searchsorted(self._source_ends, fitted.indexed.number, side="right"))
        return 2 * source + (not fitted.images)

    def _encode(
        self, fitted: FittedSample, failures: list[SampleFailure]
    ) -> tuple[EncodedSample, ...]:
        """Reads a sample's text; one that cannot be read any more is blank and a failure."""
        try:
            return self._reader.encode(fitted)
        except (DataError, OSError) as error:
            indexed = fitted.indexed
            reason = f"annotation {indexed.id!r}: {error}"
            failures.append(self._reader.failure(indexed, "read", reason))
            return self._reader.blank(fitted)


def _repeated(values: Sequence[T], times: Sequence[int]) -> list[T]:
    """Each value as often as its number says."""
    return [value for value, number in zip(values, times, strict=True) for _ in range(number)]


def groups_of(index: Index) -> tuple[tuple[str, str], ...]:
    """(source, kind) of each group of samples; the kind is `images` or `text_only`.

    Sources of one name get a number.
    """
    groups: list[tuple[str, str]] = []
    seen: dict[str, int] = {}
    for source in index.settings.sources:
        seen[source.name] = seen.get(source.name, 0) + 1
        count = seen[source.name]
        name = source.name if count == 1 else f"{source.name}_{count}"
        groups += [(name, "images"), (name, "text_only")]
    return tuple(groups)
