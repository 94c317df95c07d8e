"""One small interface over the formats of training data; `configured.py` leads to it.

A source file can list the places of its records without keeping them, read the record at a place,
and read an image of it. A place is a pair of numbers that fits an index of fixed width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dattn_mcore.config.schema import MappingConfig
from dattn_mcore.data.sources.arrow import ArrowFile
from dattn_mcore.data.sources.json_file import JsonFile
from dattn_mcore.data.sources.metadata import known_metadata
from dattn_mcore.data.sources.parquet import ParquetFile
from dattn_mcore.data.sources.place import ImagePlace, Place
from dattn_mcore.data.sources.record import Sample
from dattn_mcore.data.sources.records.draft import Form
from dattn_mcore.data.sources.records.forms import (
    FORMS,
    WEBDATASET,
    WIDENED,
)
from dattn_mcore.data.sources.records.mapping import mapped_form
from dattn_mcore.data.sources.signatures import check_signature
from dattn_mcore.data.sources.tar import TarFile
from dattn_mcore.data.sources.unpack import unpacked


class SourceFile(Protocol):
    """One file of records.

    Attributes:
        path: The file as the user named it.
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

    def raw(self, place: Place) -> Any:
        """Reads and decodes one record, without checking it.

        Raises:
            DataError: It cannot be decoded.
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
        format: `json`, `tar`, `parquet` or `arrow`: how records lie in a file.
        image_folder: As configured; "": paths are relative to the file.
        metadata_keys: Names of metadata beside the known ones.
        form: Of its records: a name of `records.forms`, or `mapping`.
        mapping: Where the fields of a record stand; used where the form is `mapping`.
        unpack_folder: Where compressed files are unpacked.
        detected: Whether the form was found from the first records, and not given.
    """

    name: str
    weight: float
    files: tuple[Path, ...]
    format: str
    image_folder: str
    metadata_keys: tuple[str, ...] = ()
    form: str = "llava"
    mapping: MappingConfig = MappingConfig()
    unpack_folder: str = ""
    detected: bool = False

    def folder(self, number: int) -> str:
        """The folder that image paths of one of its files start in."""
        return self.image_folder or str(self.files[number].parent)

    def folders(self) -> list[str]:
        """The image folders of all its files, each once."""
        return list(dict.fromkeys(self.folder(number) for number in range(len(self.files))))


def form_of(source: Source) -> Form:
    """The form of a source's records."""
    if source.form == "mapping":
        return mapped_form(source.mapping)
    return WIDENED.get(source.form, FORMS[source.form]) if source.detected else FORMS[source.form]


def open_source_file(source: Source, number: int, in_order: bool = False) -> SourceFile:
    """Opens one file of a source.

    Args:
        source: The source.
        number: Of the file in it.
        in_order: Its records will be read in order; less of it is kept in memory then.

    Raises:
        DataError: It cannot be read, or its format needs a package that is absent.
    """
    return open_as(source, number, form_of(source), in_order)


def open_as(source: Source, number: int, form: Form | None, in_order: bool = False) -> SourceFile:
    """Likewise, for records of a given form.

    Args:
        source: The source.
        number: Of the file in it.
        form: Of its records; None: it is not known yet, and `raw` alone may be called.
        in_order: Its records will be read in order.
    """
    named = source.files[number]
    path = unpacked(named, source.unpack_folder)
    check_signature(path, named, source.format)
    called = None if path == named else named
    known = known_metadata(source.metadata_keys) | (form.metadata if form else frozenset())
    folder = source.folder(number)
    if source.format == "parquet":
        return ParquetFile(path, folder, in_order, known, form, called)
    if source.format == "arrow":
        return ArrowFile(path, folder, known, form, called)
    if source.format == "tar":
        return TarFile(path, known, form or WEBDATASET, called)
    return JsonFile(path, folder, known, form or WEBDATASET, called)
