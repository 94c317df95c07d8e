"""Finds, checks and opens the index of a configuration; makes it where that is allowed."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dattn_mcore.config.schema import Config
from dattn_mcore.config.sharing import why_apart
from dattn_mcore.data.index.build import build_index, describe_file, locked
from dattn_mcore.data.index.image_identity import NOT_HASHED, ImageIdentity, identity_of_image
from dattn_mcore.data.index.layout import IndexSettings, settings_of
from dattn_mcore.data.index.rows import RowMaker
from dattn_mcore.data.sources.place import ImagePlace, Place
from dattn_mcore.data.templates import check_symbols
from dattn_mcore.data.tokenizer import Tokenizer
from dattn_mcore.errors import DataError

_LOG = logging.getLogger(__name__)
_MOST_BAD_LOOKED_AT = 1000  # bad images that are tried again when an index is opened


@dataclass(frozen=True, slots=True)
class IndexedImage:
    """An image, as the index knows it.

    Attributes:
        place: Where its bytes are.
        identity: Which image it is; equal for all samples that show it.
        width: Pixels, after its orientation is applied.
        height: Pixels, after its orientation is applied.
        num_tiles: Tiles it is cut into.
        grid: AnyRes columns and rows; (0, 0) for one square.
        text_before: Text rows of its sample that stand before it.
    """

    place: ImagePlace
    identity: ImageIdentity
    width: int
    height: int
    num_tiles: int
    grid: tuple[int, int]
    text_before: int


@dataclass(frozen=True, slots=True)
class IndexedBranch:
    """A branch of a sample, as the index knows it.

    Attributes:
        text_rows: Its text rows under the index's template.
        text_before: How many of them stand before each image of the sample.
    """

    text_rows: int
    text_before: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class IndexedSample:
    """A sample, as the index knows it.

    Attributes:
        number: In the index.
        id: Annotation id.
        file: Number of its file.
        place: Where its record stands.
        text_rows: Text rows under the index's template, those of all branches.
        images: Its images.
        branches: At least two, or none.
    """

    number: int
    id: str
    file: int
    place: Place
    text_rows: int
    images: tuple[IndexedImage, ...]
    branches: tuple[IndexedBranch, ...] = ()


class Index:
    """An index, mapped from its files: constant memory, however many samples.

    Attributes:
        folder: Where it is.
        content: What index.json says.
        samples: SAMPLE rows.
        images: IMAGE rows.
        branches: BRANCH numbers.
        usable: uint8, one per sample.
    """

    def __init__(self, folder: Path, settings: IndexSettings) -> None:
        """Maps the files.

        Raises:
            DataError: One of them is missing or damaged.
        """
        self.folder, self.settings = folder, settings
        self._files = settings.files
        try:
            self.content: dict[str, Any] = json.loads((folder / "index.json").read_text("utf-8"))
            self.samples = np.load(folder / "samples.npy", mmap_mode="r")
            self.images = np.load(folder / "images.npy", mmap_mode="r")
            self.branches = np.load(folder / "branches.npy", mmap_mode="r")
            self.usable = np.load(folder / "usable.npy", mmap_mode="r")
            if (folder / "names.bin").stat().st_size:
                self._names: np.ndarray = np.memmap(folder / "names.bin", np.uint8, "r")
            else:
                self._names = np.zeros(0, np.uint8)
            if len(self.samples) != self.content["num_samples"]:
                raise ValueError("tables of unequal length")
        except (OSError, EOFError, ValueError, KeyError) as error:
            raise DataError(
                f"index '{folder}' is damaged ({error}); remove the folder, it is made again"
            ) from None

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def num_usable(self) -> int:
        """Samples that can be trained on."""
        return int(self.content["num_usable"])

    def name(self, row: Any) -> str:
        """Id of a SAMPLE row, or name of an IMAGE row."""
        start = int(row["name_start"])
        return self._names[start : start + int(row["name_length"])].tobytes().decode("utf-8")

    def ids(self, numbers: Sequence[int] | np.ndarray) -> list[str]:
        """Annotation ids of samples."""
        return [self.name(self.samples[number]) for number in numbers]

    def sample(self, number: int) -> IndexedSample:
        """Everything about one sample."""
        row = self.samples[number]
        first, count = int(row["first_image"]), int(row["num_images"])
        name = self.name(row)
        rows = self.images[first : first + count]
        places = [self._place(image) for image in rows]
        inside = tuple(place for place in places if place.length)
        file = int(row["file"])
        place = Place(int(row["offset"]), int(row["length"]), name, inside, int(row["kind"]))
        within, source = self._files[file]
        images = tuple(
            self._image(
                image,
                where,
                identity_of_image(source, within, place, where, _content(image)),
            )
            for image, where in zip(rows, places, strict=True)
        )
        return IndexedSample(
            number=number,
            id=name,
            file=file,
            place=place,
            text_rows=int(row["text_rows"]),
            images=images,
            branches=self._branches(row),
        )

    def bad(self) -> Iterator[dict[str, Any]]:
        """Yields what is unusable: sample, id, file, where, path, stage, reason."""
        with open(self.folder / "bad.jsonl", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)

    def source_ranges(self) -> list[tuple[int, int]]:
        """First and behind-last sample number of every source."""
        ranges, start, file = [], 0, 0
        for source in self.settings.sources:
            count = sum(self.content["records"][file : file + len(source.files)])
            ranges.append((start, start + count))
            start, file = start + count, file + len(source.files)
        return ranges

    def _branches(self, row: Any) -> tuple[IndexedBranch, ...]:
        if not self.content["num_branched"] or not row["num_branches"]:
            return ()
        first, width = int(row["first_branch"]), 1 + int(row["num_images"])
        numbers = self.branches[first : first + int(row["num_branches"]) * width]
        found = numbers.reshape(-1, width).tolist()
        return tuple(IndexedBranch(one[0], tuple(one[1:])) for one in found)

    def _place(self, row: Any) -> ImagePlace:
        return ImagePlace(self.name(row), int(row["offset"]), int(row["length"]))

    def _image(self, row: Any, place: ImagePlace, identity: ImageIdentity) -> IndexedImage:
        return IndexedImage(
            place=place,
            identity=identity,
            width=int(row["width"]),
            height=int(row["height"]),
            num_tiles=int(row["num_tiles"]),
            grid=(int(row["columns"]), int(row["rows"])),
            text_before=int(row["text_before"]),
        )


def _content(row: Any) -> tuple[int, int]:
    if "content" not in row.dtype.names:
        return NOT_HASHED
    high, low = row["content"].tolist()
    return high, low


def index_folder(config: Config, settings: IndexSettings) -> Path:
    """Where the index of a configuration is, or would be."""
    if config.data.index_dir is not None:
        return Path(config.data.index_dir) / settings.name
    return settings.sources[0].files[0].parent / ".index" / settings.name


def open_index(
    config: Config, tokenizer: Tokenizer, workers: int = 0, again: bool = False
) -> Index:
    """Opens the index of a configuration; makes it where it is absent or stale.

    Args:
        config: The run.
        tokenizer: Its tokenizer, opened.
        workers: Processes that make it; 0: this one.
        again: Make it whatever is there.

    Raises:
        DataError: A source is missing or malformed, the tokenizer lacks a token of the template,
            the index is absent or stale and `data.build_index` is false, or samples have branches
            and this run cannot share visual rows.
    """
    check_symbols(tokenizer, config.data.template)
    settings = settings_of(config, tokenizer)
    folder = index_folder(config, settings)
    why = "it was asked for" if again else why_stale(folder, settings, tokenizer)
    if why is None:
        return _with_branches(Index(folder, settings), config)
    if not config.data.build_index:
        raise DataError(
            f"index '{folder}' cannot be used: {why}; data.build_index is false, so make it first: "
            "python -m dattn_mcore.data index --config ..."
        )
    with locked(folder):
        if again or (why := why_stale(folder, settings, tokenizer)) is not None:
            if (folder / "index.json").exists():
                _LOG.info("index '%s' is made again: %s", folder, why)
            build_index(folder, settings, tokenizer, workers)
    return _with_branches(Index(folder, settings), config)


def _with_branches(index: Index, config: Config) -> Index:
    """Refuses samples with branches where no visual rows can be shared; looked for if there are."""
    if not index.content["num_branched"] or (reason := why_apart(config)) is None:
        return index
    rows = index.samples
    numbers = np.flatnonzero((rows["num_branches"] > 0) & (rows["num_images"] > 0))
    if not len(numbers):
        return index
    more = f" (and {len(numbers) - 1:,} more)" if len(numbers) > 1 else ""
    raise DataError(
        f"annotation {index.ids(numbers[:1])[0]!r}{more} has branches, which share visual rows, "
        f"and this run shares none ({reason}); change that, or make each branch a record of its own"
    )


def why_stale(folder: Path, settings: IndexSettings, tokenizer: Tokenizer) -> str | None:
    """Why an index cannot be used; None where it can.

    Its folder's name stands for the settings, so what is left to check is whether the files are
    what they were, and whether an image that was unusable has been fixed.
    """
    try:
        content = json.loads((folder / "index.json").read_text("utf-8"))
        files = content["files"]
    except (OSError, ValueError, KeyError):
        return "it is absent"
    if content["settings"] != settings.as_json():
        return "it was made with other settings"
    for number, known in enumerate(files):
        path = Path(known["path"])
        status = path.stat()
        if status.st_size != known["size"]:
            return f"'{path}' has changed"
        # A copy has another time and the same content.
        touched = status.st_mtime_ns != known["time"]
        if touched and describe_file(settings, number)["digest"] != known["digest"]:
            return f"'{path}' has changed"
    return _mended(folder, settings, tokenizer)


def _mended(folder: Path, settings: IndexSettings, tokenizer: Tokenizer) -> str | None:
    """Looks again at the first images that were unusable."""
    maker: RowMaker | None = None
    with open(folder / "bad.jsonl", encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            if number == _MOST_BAD_LOOKED_AT:
                break
            entry = json.loads(line)
            if entry["stage"] != "image":
                continue
            maker = maker or RowMaker(settings, tokenizer)
            if not maker.still_bad(entry["path"], entry["file"]):
                return f"image '{entry['path']}' was unusable and has been fixed"
    return None
