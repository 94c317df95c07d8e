"""One small interface over the formats of training data, and the configuration's way to it.

A source file can list the places of its records without keeping them, read the record at a place,
and read an image of it. A place is a pair of numbers that fits an index of fixed width.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dattn_mcore.config.schema import DataConfig, SourceConfig
from dattn_mcore.data.sources.json_file import JsonFile
from dattn_mcore.data.sources.metadata import known_metadata
from dattn_mcore.data.sources.parquet import ParquetFile
from dattn_mcore.data.sources.place import ImagePlace, Place
from dattn_mcore.data.sources.record import Sample
from dattn_mcore.data.sources.tar import TarFile
from dattn_mcore.errors import DataError


class SourceFile(Protocol):
    """One file of records.

    Attributes:
        path: The file.
        image_folder: Folder that image paths start in, or None where images lie in the file.
    """

    path: Path
    image_folder: str | None

    def scan(self) -> Iterator[Place]:
        """Yields the place of every record, in order, in constant memory.

        Raises:
            DataError: The file is no whole file of its format.
        """

    def digest(self) -> str:
        """Returns a SHA-256 of what the records depend on."""

    def read(self, place: Place) -> tuple[Sample, tuple[ImagePlace, ...]]:
        """Reads and checks one record.

        Raises:
            DataError: What is wrong with it, without saying where it stands.
        """

    def image(self, place: Place, image: ImagePlace) -> bytes:
        """Reads an image that lies in this file (never called for files in a folder).

        Raises:
            DataError: It cannot be read.
        """

    def share(self, place: Place) -> float:
        """Share of the file that stands before a record, 0 to 1, for progress."""

    def line(self, offset: int) -> str:
        """Says where a record stands, for people: "line 7", "row 12"."""

    def close(self) -> None:
        """Closes the file."""


@dataclass(frozen=True)
class Source:
    """Files that are mixed in with one weight.

    Attributes:
        name: How reports call it.
        weight: How often each of its samples is seen in an epoch.
        files: Paths of its files, in order.
        format: `json`, `tar` or `parquet`.
        image_folder: See SourceFile.
        metadata_keys: Names of metadata beside the known ones.
    """

    name: str
    weight: float
    files: tuple[Path, ...]
    format: str
    image_folder: str
    metadata_keys: tuple[str, ...] = ()


def configured_sources(data: DataConfig) -> list[Source]:
    """The sources of a configuration, their files found.

    Raises:
        DataError: A pattern that matches no file, or a file of unknown format.
    """
    if not data.sources:
        only = SourceConfig(annotations=data.annotations, image_folder=data.image_folder)
        return [_source(only, "data.annotations", data.metadata_keys)]
    return [
        _source(source, f"data.sources[{number}].annotations", data.metadata_keys)
        for number, source in enumerate(data.sources)
    ]


def _source(source: SourceConfig, setting: str, metadata_keys: tuple[str, ...]) -> Source:
    pattern = source.annotations
    if Path(pattern).exists() or not glob.has_magic(pattern):
        files: Sequence[str] = [pattern]
    else:
        files = sorted(glob.glob(pattern, recursive=True))
        if not files:
            raise DataError(f"{setting}: pattern '{pattern}' matches no file; name files or shards")
    for file in files:
        _check_file(Path(file), setting)
    formats = {_format(Path(file), source.format, setting) for file in files}
    if len(formats) > 1:
        raise DataError(
            f"{setting}: '{pattern}' matches files of several formats ({', '.join(sorted(formats))}"
            "); make a source of each"
        )
    return Source(
        name=Path(pattern).stem if len(files) == 1 else pattern,
        weight=source.weight,
        files=tuple(Path(file) for file in files),
        format=formats.pop(),
        image_folder=source.image_folder,
        metadata_keys=tuple(sorted(set(metadata_keys))),
    )


def _check_file(path: Path, setting: str) -> None:
    if not path.exists():
        raise DataError(f"{setting}: file '{path}' does not exist; give the path of a LLaVA JSON")
    if not path.is_file():
        raise DataError(f"{setting}: '{path}' is not a regular file; give a LLaVA JSON file")
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise DataError(f"{setting}: '{path}' cannot be read ({error.strerror})") from None


def _format(path: Path, wanted: str, setting: str) -> str:
    """The format of a file: as configured, else by its name."""
    if wanted != "auto":
        return wanted
    suffix = path.suffix.lower()
    for name, suffixes in (
        ("json", (".json", ".jsonl", ".ndjson")),
        ("tar", (".tar",)),
        ("parquet", (".parquet", ".pq")),
    ):
        if suffix in suffixes:
            return name
    if suffix in (".gz", ".tgz", ".bz2", ".xz", ".zst"):
        raise DataError(
            f"{setting}: '{path}' is compressed; samples are read at random, so unpack it "
            "(images are compressed already)"
        )
    return "json"


def open_source_file(source: Source, number: int, in_order: bool = False) -> SourceFile:
    """Opens one file of a source.

    Args:
        source: The source.
        number: Of the file in it.
        in_order: Its records will be read in order; less of it is kept in memory then.

    Raises:
        DataError: It cannot be read, or its format needs a package that is absent.
    """
    path, known = source.files[number], known_metadata(source.metadata_keys)
    if source.format == "tar":
        return TarFile(path, known)
    if source.format == "parquet":
        return ParquetFile(path, source.image_folder, in_order, known)
    return JsonFile(path, source.image_folder, known)
