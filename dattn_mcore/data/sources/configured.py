"""From the configuration to sources: their files found, and the form of their records."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dattn_mcore.config.schema import DataConfig, MappingConfig, SourceConfig
from dattn_mcore.data.sources.arrow import saved_files
from dattn_mcore.data.sources.place import CAPTION
from dattn_mcore.data.sources.record import RecordError
from dattn_mcore.data.sources.records.forms import (
    FORMS,
    LOOKED_AT,
    WEBDATASET,
    detect,
    unknown_form,
)
from dattn_mcore.data.sources.records.mapping import check_mapping
from dattn_mcore.data.sources.source import Source, SourceFile, open_as
from dattn_mcore.data.sources.table import TableFile
from dattn_mcore.data.sources.tar import TarFile
from dattn_mcore.data.sources.unpack import inner_name
from dattn_mcore.errors import DataError

CONTAINERS = {
    "json": (".json", ".jsonl", ".ndjson"),
    "tar": (".tar",),
    "parquet": (".parquet", ".pq"),
    "arrow": (".arrow",),
}
TABLES = ("parquet", "arrow")
_WAY_OUT = "give a JSON, tar, parquet or Arrow file of samples (docs/data.md)"


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
    form = _given_form(source, setting)
    if form is not None:
        return replace(found, form=form)
    for number, path in enumerate(found.files):
        opened = open_as(found, number, None)
        try:
            if (name := _detected(opened, path, setting)) is not None:
                return replace(found, form=name, detected=True)
        finally:
            opened.close()
    if found.format in TABLES:
        raise DataError(f"{setting}: '{pattern}' has no rows; name a file that holds samples")
    return replace(found, form="llava", detected=True)  # no records: said where they are counted


def _given_form(source: SourceConfig, setting: str) -> str | None:
    """The form of a source's records as configured; None: it is found from the first ones."""
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
    return source.format if source.format in FORMS else None


def _detected(opened: SourceFile, path: Path, setting: str) -> str | None:
    """The form of a file's first records; None where it has no records."""
    records: list[tuple[str, Any]] = []
    broken: list[str] = []
    captions = False
    for number, place in enumerate(opened.scan()):
        if number == LOOKED_AT:
            break
        where = f"'{path}' {opened.line(place.offset)} (index {number})"
        if isinstance(opened, TarFile) and (place.fault or not place.length):
            broken.append(f"{where}: {place.fault or 'it has no text'}")
            continue
        captions = captions or place.kind == CAPTION
        try:
            raw = opened.raw(place)
        except DataError as error:
            if isinstance(opened, TableFile) and not isinstance(error, RecordError):
                raise  # the file's own damage, not that of a record
            broken.append(f"{where}: {error}")
            continue  # one bad sample, reported as such
        if place.kind != CAPTION:
            records.append((where, raw))
    try:
        form = detect(records)
    except DataError as error:
        raise DataError(f"{setting}: {error}") from None
    if form is not None:
        return form
    if captions:
        return WEBDATASET.name
    if not records and not broken:
        return None
    if not records:
        raise DataError(
            f"{setting}: the form of the records cannot be found, as none of the first "
            f"{len(broken)} can be read: {broken[0]}; correct the file, or set format: of the "
            "source in data.sources"
        )
    hopeful = [raw for _, raw in records if isinstance(raw, dict) and "conversations" not in raw]
    if len(hopeful) == len(records):
        raise DataError(f"{setting}: {unknown_form(*records[0])}")
    return "llava"  # turns that are none: each record says what is wrong


def _check_file(path: Path, setting: str) -> None:
    if not path.exists():
        raise DataError(f"{setting}: file '{path}' does not exist; {_WAY_OUT}")
    if not path.is_file():
        raise DataError(f"{setting}: '{path}' is not a regular file; {_WAY_OUT}")
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
