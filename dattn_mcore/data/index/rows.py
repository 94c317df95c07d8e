"""One record becomes one row of the index: read, checked, tokenised, its images' headers read."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dattn_mcore.data.image_files import (
    ImageHeader,
    check_folder,
    probe_image,
    probe_image_file,
    read_bytes,
)
from dattn_mcore.data.index.image_identity import NOT_HASHED, content_of, identity_of_image
from dattn_mcore.data.index.layout import (
    BRANCH,
    FORMATS,
    IMAGE,
    NEVER,
    SAMPLE,
    ImageRow,
    IndexSettings,
    SampleRow,
)
from dattn_mcore.data.record_places import RecordPlaces
from dattn_mcore.data.record_runs import texts_of
from dattn_mcore.data.sources.open_files import OpenFiles
from dattn_mcore.data.sources.place import ImagePlace, Place
from dattn_mcore.data.sources.record import RecordError, Sample
from dattn_mcore.data.sources.records.forms import WEBDATASET, other_form
from dattn_mcore.data.templates import Run, TextRun
from dattn_mcore.data.tiles import Tiling, tiling_of_image
from dattn_mcore.data.tokenizer import Tokenizer, load_tokenizer
from dattn_mcore.errors import DataError

_LONGEST_NAME = 65535  # bytes: its length is two bytes of a row
_MOST_OPEN = 8  # files; parts come in the order of files, and shards can be thousands


@dataclass
class IndexPart:
    """Rows of some neighbouring records.

    Attributes:
        samples: SAMPLE rows; names and images counted from the part's start.
        images: IMAGE rows.
        branches: BRANCH numbers; counted from the part's start.
        usable: Whether each sample can be used.
        names: Bytes of names.bin.
        bad: What is unusable; `sample` counted from the part's start.
        ignored: In how many samples each kind of metadata is left aside.
    """

    samples: list[SampleRow] = field(default_factory=list)
    images: list[ImageRow] = field(default_factory=list)
    branches: list[int] = field(default_factory=list)
    usable: list[bool] = field(default_factory=list)
    names: bytearray = field(default_factory=bytearray)
    bad: list[dict[str, Any]] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)

    def name(self, text: str) -> tuple[int, int]:
        """Stores a name; returns where it starts and its length in bytes."""
        raw = text.encode("utf-8", "replace")
        if len(raw) > _LONGEST_NAME:
            raw = raw[:_LONGEST_NAME].decode("utf-8", "ignore").encode()  # no half character
        start = len(self.names)
        self.names += raw
        return start, len(raw)

    def arrays(self) -> dict[str, np.ndarray]:
        """The tables."""
        return {
            "samples": np.array(self.samples, SAMPLE),
            "images": np.array(self.images, IMAGE),
            "branches": np.array(self.branches, BRANCH),
            "usable": np.array(self.usable, np.uint8),
            "names": np.frombuffer(bytes(self.names), np.uint8),
        }


@dataclass(frozen=True)
class _Encoded:
    """What the index keeps of a sample's text."""

    text_rows: int
    first_label: int
    supervised: int
    text_before: tuple[int, ...]  # text rows before each image, in the first branch if it has some
    branches: tuple[tuple[int, ...], ...] = ()  # text rows of each, and those before each image


class RowMaker:
    """Makes rows; one for each process that works on an index."""

    def __init__(self, settings: IndexSettings, tokenizer: Tokenizer | None = None) -> None:
        """Opens the tokenizer (files are opened as they come).

        Raises:
            DataError: The tokenizer, or an image folder, cannot be read.
        """
        self._settings = settings
        self._tokenizer = tokenizer or load_tokenizer(settings.tokenizer)
        self._sources = settings.files
        self._files = OpenFiles(self._sources, _MOST_OPEN, in_order=True)
        self._record_places = RecordPlaces(self._sources, self._files.get)
        self._folders: dict[str, Path] = {}
        # Conversations about one image stand near each other in the usual data sets.
        self._probe = functools.lru_cache(maxsize=4096)(self._probe_file)
        self._hash = functools.lru_cache(maxsize=4096)(self._hash_file)

    def rows_of(self, file: int, places: list[Place]) -> IndexPart:
        """Makes the rows of some records of one file.

        Raises:
            DataError: One that cannot be read is a record of another form than the source's.
        """
        made = IndexPart()
        self._files.make_room()
        source = self._files.get(file)
        for number, place in enumerate(places):
            found: tuple[ImagePlace, ...] = ()
            name, stage, path, reason = place.key, "annotation", None, None
            try:
                sample, found = source.read(place)
                name = sample.id
                encoded = self._encode(sample)
                stage = "image"
                rows = []
                for image, before in zip(found, encoded.text_before, strict=True):
                    path = image.name
                    rows.append(self._image_row(made, file, place, image, before))
            except DataError as error:
                if stage == "annotation":
                    self._check_form(file, place)
                reason = str(error)
                name = (error.id if isinstance(error, RecordError) else "") or name
                encoded, rows = _Encoded(0, NEVER, 0, ()), []
            start, length = made.name(name)
            made.samples.append(
                SampleRow(
                    offset=place.offset,
                    length=place.length,
                    file=file,
                    name_start=start,
                    first_image=len(made.images),
                    text_rows=encoded.text_rows,
                    first_label=encoded.first_label,
                    supervised=encoded.supervised,
                    name_length=length,
                    num_images=len(rows),
                    num_tiles=sum(row.num_tiles for row in rows),
                    kind=place.kind,
                    first_branch=len(made.branches),
                    num_branches=len(encoded.branches),
                )
            )
            made.images += rows
            made.branches += [number for branch in encoded.branches for number in branch]
            made.usable.append(reason is None)
            if reason is None:
                made.ignored.update(sample.ignored)
            else:
                made.bad.append(
                    {
                        **{"sample": number, "id": name, "file": file, "offset": place.offset},
                        "field": self._record_places.field(file, place, path) if path else "",
                        **{"path": path, "stage": stage, "reason": reason},
                    }
                )
        return made

    def still_bad(self, path: str, file: int) -> bool:
        """Whether an image file that was unusable still is (images in shards always are)."""
        try:
            folder = self._files.get(file).image_folder
            if folder is not None:
                header = self._probe_file(folder, path, hint=False)
                self._tiling(f"image '{path}'", header)
                return False
        except DataError:
            pass
        return True

    def _check_form(self, file: int, place: Place) -> None:
        """Refuses a source that mixes forms; looked at where a record cannot be read."""
        opened, (number, source) = self._files.get(file), self._sources[file]
        try:
            other = other_form(opened.raw(place), source.form)
        except DataError:
            return
        if other is not None:
            # Captions are read beside records of any form.
            captions = source.form == WEBDATASET.name
            way_out = f"set format: {other} of it" if captions else "make a source of each form"
            raise DataError(
                f"'{source.files[number]}' {opened.line(place.offset)} is a record of {other}, and "
                f"the source is read as {source.form}; {way_out}"
            )

    def _encode(self, sample: Sample) -> _Encoded:
        settings = self._settings
        texts = texts_of(self._tokenizer, settings.template, sample, settings.loss_on)
        found = [_counted(runs) for runs in texts]
        if len(found) == 1:
            return found[0]
        return _Encoded(
            text_rows=sum(one.text_rows for one in found),
            first_label=found[0].first_label,
            supervised=sum(one.supervised for one in found),
            text_before=found[0].text_before,
            branches=tuple((one.text_rows, *one.text_before) for one in found),
        )

    def _image_row(
        self, made: IndexPart, file: int, place: Place, image: ImagePlace, before: int
    ) -> ImageRow:
        settings, source = self._settings, self._files.get(file)
        within, described = self._sources[file]
        who, content = f"image '{image.name}'", NOT_HASHED
        if image.length or source.image_folder is None:
            data = source.image(place, image)
            header = probe_image(who, data, settings.max_pixels, settings.rules)
            if settings.hash_images:
                content = content_of(data)
        else:
            header = self._probe(source.image_folder, image.name)
            if settings.hash_images:
                content = self._hash(source.image_folder, image.name)
        identity = identity_of_image(described, within, place, image, content)
        tiling = self._tiling(who, header)
        start, length = made.name(image.name)
        columns, rows = tiling.grid
        kind = FORMATS.index(header.format) if header.format in FORMATS else 0
        return ImageRow(
            offset=image.offset,
            name_start=start,
            length=image.length,
            width=header.width,
            height=header.height,
            text_before=before,
            num_tiles=tiling.num_tiles,
            name_length=length,
            columns=columns,
            rows=rows,
            format=kind,
            identity=identity.digest,
            content=content,
        )

    def _tiling(self, who: str, header: ImageHeader) -> Tiling:
        settings = self._settings
        return tiling_of_image(
            who=who,
            width=header.width,
            height=header.height,
            policy=settings.policy,
            tile_size=settings.tile_size,
            grids=settings.grids,
            max_pixels=settings.max_pixels,
            ties=settings.rules.anyres_ties,
        )

    def _hash_file(self, folder: str, path: str) -> tuple[int, int]:
        """Hashes an image that has been probed, so that its folder is known."""
        data = read_bytes(self._folders[folder], path, f"image '{path}'", self._settings.max_pixels)
        return content_of(data)

    def _probe_file(self, folder: str, path: str, hint: bool = True) -> ImageHeader:
        if folder not in self._folders:
            self._folders[folder] = check_folder(folder)
        settings = self._settings
        return probe_image_file(
            self._folders[folder], path, settings.max_pixels, hint, settings.rules
        )


def _counted(runs: Sequence[Run]) -> _Encoded:
    """What the index keeps of one text."""
    rows, first, supervised = 0, NEVER, 0
    before = []
    for run in runs:
        if not isinstance(run, TextRun):
            before.append(rows)
            continue
        count = sum(run.supervised) - (rows == 0 and run.supervised[0])
        if count and first == NEVER:
            # Row i predicts row i + 1, so the label stands one row before what it predicts.
            first = rows + run.supervised.index(True, int(rows == 0)) - 1
        supervised += count
        rows += len(run.ids)
    return _Encoded(rows, first, supervised, tuple(before))
