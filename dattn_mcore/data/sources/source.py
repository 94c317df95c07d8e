"""One small interface over the formats of training data, and the configuration's way to it.

A source file can list the places of its records without keeping them, read the record at a place,
and read an image of it. A place is a pair of numbers that fits an index of fixed width.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from dattn_mcore.config.schema import DataConfig, MappingConfig, SourceConfig
from dattn_mcore.data.sources.arrow import ArrowFile, saved_files
from dattn_mcore.data.sources.json_file import JsonFile
from dattn_mcore.data.sources.metadata import known_metadata
from dattn_mcore.data.sources.parquet import ParquetFile
from dattn_mcore.data.sources.place import CAPTION, ImagePlace, Place
from dattn_mcore.data.sources.record import Sample
from dattn_mcore.data.sources.records.draft import Form
from dattn_mcore.data.sources.records.forms import (
    FORMS,
    LOOKED_AT,
    WEBDATASET,
    detect,
    unknown_form,
)
from dattn_mcore.data.sources.records.mapping import check_mapping, mapped_form
from dattn_mcore.data.sources.tar import TarFile
from dattn_mcore.data.sources.unpack import inner_name, unpacked
from dattn_mcore.errors import DataError

CONTAINERS = {
    "json": (".json", ".jsonl", ".ndjson"),
    "tar": (".tar",),
    "parquet": (".parquet", ".pq"),
    "arrow": (".arrow",),
}


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

    def folder(self, number: int) -> str:
        """The folder that image paths of one of its files start in."""
        return self.image_folder or str(self.files[number].parent)

    def folders(self) -> list[str]:
        """The image folders of all its files, each once."""
        return list(dict.fromkeys(self.folder(number) for number in range(len(self.files))))


def configured_sources(data: DataConfig) -> list[Source]:
    """The sources of a configuration, their files and the forms of their records found.

    Raises:
        DataError: A pattern that matches no file, a file of unknown format, or records of unknown
            form or of several.
    """
    if not data.sources:
        only = SourceConfig(annotations=data.annotations, image_folder=data.image_folder)
        return [_source(only, "data.annotations", data)]
    return [
        _source(source, f"data.sources[{number}].annotations", data)
        for number, source in enumerate(data.sources)
    ]


def _source(source: SourceConfig, setting: str, data: DataConfig) -> Source:
    pattern = source.annotations
    if Path(pattern).exists() or not glob.has_magic(pattern):
        files: Sequence[str] = [pattern]
        if Path(pattern).is_dir():
            files = saved_files(Path(pattern), setting) or files
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
    found = Source(
        name=Path(pattern).stem if len(files) == 1 else pattern,
        weight=source.weight,
        files=tuple(Path(file) for file in files),
        format=formats.pop(),
        image_folder=source.image_folder,
        metadata_keys=tuple(sorted(set(data.metadata_keys))),
        mapping=source.mapping,
        unpack_folder=data.index_dir or str(Path(files[0]).parent / ".index"),
    )
    return replace(found, form=_form(found, source, setting))


def _form(found: Source, source: SourceConfig, setting: str) -> str:
    """The form of a source's records: as configured, else from the first ones."""
    if source.mapping != MappingConfig():
        if source.format in FORMS:
            raise DataError(
                f"{setting.rpartition('.')[0]}: mapping: and format: {source.format} are both "
                "there; give one of them"
            )
        try:
            check_mapping(source.mapping)
        except DataError as error:
            raise DataError(f"{setting.rpartition('.')[0]}: {error}") from None
        return "mapping"
    if source.format in FORMS:
        return source.format
    opened = _open(found, 0, None, in_order=False)
    try:
        return _detected(opened, found.files[0], setting)
    finally:
        opened.close()


def _detected(opened: SourceFile, path: Path, setting: str) -> str:
    """The form of a file's first records."""
    records, broken = [], 0
    captions = False
    for number, place in enumerate(opened.scan()):
        if number == LOOKED_AT:
            break
        if isinstance(opened, TarFile) and (place.fault or not place.length):
            broken += 1
            continue
        captions = captions or place.kind == CAPTION
        try:
            raw = opened.raw(place)
        except DataError:
            broken += 1
            continue  # one bad sample, reported as such
        if place.kind != CAPTION:
            where = f"'{path}' {opened.line(place.offset)} (index {number})"
            records.append((where, raw))
    try:
        form = detect(records)
    except DataError as error:
        raise DataError(f"{setting}: {error}") from None
    if form is not None:
        return form
    if captions:
        return WEBDATASET.name
    hopeful = [raw for _, raw in records if isinstance(raw, dict) and "conversations" not in raw]
    if records and len(hopeful) == len(records) and not broken:
        raise DataError(f"{setting}: {unknown_form(*records[0])}")
    return "llava"  # nothing but damage, or turns that are none: each record says what is wrong


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
    """The container of a file: as configured, else by its name."""
    if wanted in CONTAINERS:
        return wanted
    suffix = Path(inner_name(path)).suffix.lower()
    for name, suffixes in CONTAINERS.items():
        if suffix in suffixes:
            return name
    if suffix in (".bz2", ".xz", ".zip", ".7z", ".lz4"):
        raise DataError(
            f"{setting}: '{path}' is compressed in a way that is not read; unpack it, or use gzip "
            "or zstd (images are compressed already)"
        )
    return "json"


def form_of(source: Source) -> Form:
    """The form of a source's records."""
    if source.form == "mapping":
        return mapped_form(source.mapping)
    return FORMS[source.form]


def open_source_file(source: Source, number: int, in_order: bool = False) -> SourceFile:
    """Opens one file of a source.

    Args:
        source: The source.
        number: Of the file in it.
        in_order: Its records will be read in order; less of it is kept in memory then.

    Raises:
        DataError: It cannot be read, or its format needs a package that is absent.
    """
    return _open(source, number, form_of(source), in_order)


def _open(source: Source, number: int, form: Form | None, in_order: bool) -> SourceFile:
    path = unpacked(source.files[number], source.unpack_folder)
    known = known_metadata(source.metadata_keys) | (form.metadata if form else frozenset())
    folder = source.folder(number)
    if source.format == "parquet":
        return ParquetFile(path, folder, in_order, known, form)
    if source.format == "arrow":
        return ArrowFile(path, folder, known, form)
    if source.format == "tar":
        return TarFile(path, known, form or WEBDATASET)
    return JsonFile(path, folder, known, form or WEBDATASET)
