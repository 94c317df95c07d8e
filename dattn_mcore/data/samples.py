"""Reads samples by their number in the index: text to ids and labels, images to bytes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from dattn_mcore.data.fitted_sample import FittedSample
from dattn_mcore.data.image_files import check_folder, read_bytes
from dattn_mcore.data.images import ImageRequest
from dattn_mcore.data.index.store import Index, IndexedImage, IndexedSample
from dattn_mcore.data.record_places import MOST_COUNTED, RecordPlaces
from dattn_mcore.data.record_runs import texts_of
from dattn_mcore.data.sample_failure import SampleFailure
from dattn_mcore.data.sources.open_files import OpenFiles
from dattn_mcore.data.sources.place import ImagePlace
from dattn_mcore.data.sources.record import Sample
from dattn_mcore.data.templates import (
    EncodedSample,
    encode_sample,
    truncate,
)
from dattn_mcore.data.tokenizer import Tokenizer
from dattn_mcore.errors import DataError
from dattn_mcore.types import IGNORED_LABEL

_MOST_OPEN = 256  # files of sources


class SampleReader:
    """Opens the files of an index as they are needed.

    Args:
        index: Of the run.
        tokenizer: The one the index was made with.
        rows_per_tile: Visual rows of a tile.
        max_pixels: Files too large for such an image are refused.
    """

    def __init__(
        self, index: Index, tokenizer: Tokenizer, rows_per_tile: int, max_pixels: int
    ) -> None:
        self._index, self._tokenizer = index, tokenizer
        self._rows_per_tile, self._max_pixels = rows_per_tile, max_pixels
        self._sources = index.settings.files
        self._files = OpenFiles(self._sources, _MOST_OPEN)
        self._folders: dict[str, Path] = {}
        self._places = RecordPlaces(self._sources, self._files.get, MOST_COUNTED)
        self._first = np.cumsum([0, *index.content["records"]])  # sample of each file

    def check_folders(self) -> None:
        """Fails early where an image folder is missing.

        Raises:
            DataError: Names the folder.
        """
        for source in self._index.settings.sources:
            if source.format == "json":
                for folder in source.folders():
                    self._folder(folder)

    def record(self, sample: IndexedSample) -> Sample:
        """Reads and checks a sample's record.

        Raises:
            DataError: It cannot be read any more.
        """
        return self._files.get(sample.file).read(sample.place)[0]

    def encode(self, fitted: FittedSample) -> tuple[EncodedSample, ...]:
        """Reads a sample's text and turns it into ids, labels and a layout.

        Returns:
            Each of its branches, or its only text.

        Raises:
            DataError: The record cannot be read, or is no longer what was indexed.
        """
        record = self.record(fitted.indexed)
        rows = [image.num_tiles * self._rows_per_tile for image in fitted.indexed.images]
        settings = self._index.settings
        texts = texts_of(self._tokenizer, settings.template, record, settings.loss_on)
        if len(record.images) == len(rows):
            # Branches are never cut.
            encoded = [truncate(encode_sample(runs, rows), fitted.text_rows) for runs in texts]
            if tuple(one.layout for one in encoded) == fitted.layouts(self._rows_per_tile):
                return tuple(replace(one, weight=record.weight) for one in encoded)
        raise DataError("the record is no longer the one that was indexed")

    def failure(
        self,
        sample: IndexedSample,
        stage: str,
        reason: str,
        image: IndexedImage | None = None,
        *,
        counted: bool = True,
    ) -> SampleFailure:
        """What is wrong with a sample, with the place of its record.

        Args:
            sample: The sample.
            stage: See `SampleFailure`.
            reason: One line, without the place.
            image: The image that is bad; None where it is the record.
            counted: Whether its file may be read to find the record's line.
        """
        path = None if image is None else image.place.name
        where = self._places.where(
            file=sample.file,
            offset=sample.place.offset,
            record=sample.number - int(self._first[sample.file]),
            field="" if path is None else self._places.field(sample.file, sample.place, path),
            counted=counted,
        )
        return SampleFailure(
            sample=sample.number,
            id=sample.id,
            path=path,
            stage=stage,
            reason=f"{where}: {reason}",
            where=where,
        )

    def blank(self, fitted: FittedSample) -> tuple[EncodedSample, ...]:
        """What stands in for a sample whose text cannot be read: the same shapes, no loss."""
        layouts = fitted.layouts(self._rows_per_tile)
        text_rows = [sum(rows for is_visual, rows in one if not is_visual) for one in layouts]
        return tuple(
            EncodedSample(
                text_ids=(self._tokenizer.bos_id,) * rows,
                labels=(IGNORED_LABEL,) * rows,
                layout=layout,
                image_rows=tuple(image.num_tiles * self._rows_per_tile for image in fitted.images),
            )
            for rows, layout in zip(text_rows, layouts, strict=True)
        )

    def make_room(self) -> None:
        """Closes files not used lately; only while no request is being served."""
        self._files.make_room()

    def close(self) -> None:
        """Closes all files."""
        self._files.close()

    def request(self, sample: IndexedSample, image: IndexedImage) -> ImageRequest:
        """What loads an image of a sample; reading happens in the loader's threads."""
        who = f"annotation {sample.id!r}: image '{image.place.name}'"
        # Nothing is opened here: a shard that has gone must fail this image, not the run.
        within, source = self._sources[sample.file]
        if image.place.length or source.format == "tar":
            read = partial(self._read_inside, sample, image.place, who)
        else:
            read = partial(self._read_file, source.folder(within), image.place.name, who)
        return ImageRequest(who, read, image.num_tiles, image.grid)

    def _read_inside(self, sample: IndexedSample, image: ImagePlace, who: str) -> bytes:
        try:
            return self._files.get(sample.file).image(sample.place, image)
        except DataError as error:
            raise DataError(f"{who}: {error}") from None

    def _read_file(self, folder: str, name: str, who: str) -> bytes:
        return read_bytes(self._folder(folder), name, who, self._max_pixels)

    def _folder(self, folder: str) -> Path:
        if folder not in self._folders:
            self._folders[folder] = check_folder(folder)
        return self._folders[folder]
