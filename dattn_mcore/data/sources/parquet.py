"""Parquet files as Hugging Face's data sets ship them: a row is a record.

Columns: `conversations` (list of {from, value}, or its JSON), `id` (optional), and `image` or
`images`: bytes, {bytes, path} (the Image feature of `datasets`), a path below the image folder, or
a list of any of these. A row is read with its row group, so files with small row groups (some
hundred rows) serve random access best; the groups used last are kept, up to 256 MiB of images.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dattn_mcore.data.sources.metadata import METADATA, is_filled, unknown
from dattn_mcore.data.sources.place import ImagePlace, Place
from dattn_mcore.data.sources.record import RecordError, Sample, decode_json, parse_record
from dattn_mcore.data.sources.row_groups import RowGroups
from dattn_mcore.errors import ConfigError, DataError
from dattn_mcore.parallel.packages import import_problem

# Of a process, whatever it opens. Apart, or a large group of images would throw out its text.
_TEXTS, _IMAGES = RowGroups(64 << 20), RowGroups(256 << 20)
_IN_FILE = "row {row} image {number}"


class ParquetFile:
    """A parquet file, as `SourceFile` describes it."""

    def __init__(
        self,
        path: Path,
        image_folder: str,
        in_order: bool = False,
        known: Collection[str] = METADATA,
    ) -> None:
        """Opens the file and reads its footer.

        Args:
            path: The file.
            image_folder: Folder of the images that lie beside it.
            in_order: Rows are read in order, so only the newest row group is kept.
            known: Names of metadata.

        Raises:
            DataError: It is no parquet file or lacks a column.
            ConfigError: pyarrow is not installed.
        """
        if problem := import_problem("pyarrow.parquet"):
            raise ConfigError(
                f"'{path}' is parquet, and pyarrow {problem}; install the extra 'parquet'"
            )
        parquet: Any = importlib.import_module("pyarrow.parquet")
        self.path = path
        try:
            self._file = parquet.ParquetFile(path)
        except Exception as error:  # noqa: BLE001  (pyarrow raises classes of its own)
            number = getattr(error, "errno", None)
            if number is not None:  # the system's: too many open files, a failing disk
                raise DataError(f"'{path}' cannot be read ({os.strerror(number)})") from None
            reason = " ".join(str(error).split())[:120]
            raise DataError(f"'{path}' is no whole parquet file ({reason})") from None
        names = self._file.schema_arrow.names
        if "conversations" not in names:
            raise DataError(f"'{path}' has no column 'conversations', only {', '.join(names)}")
        self._image_column = next((name for name in ("image", "images") if name in names), None)
        self._text_columns = [name for name in ("id", "conversations") if name in names]
        others = [name for name in names if name not in (*self._text_columns, self._image_column)]
        self._metadata = tuple(name for name in others if name.casefold() in known)
        self._unknown = [name for name in others if name.casefold() not in known]
        self._known = known
        self.image_folder: str | None = image_folder
        self._in_order = in_order
        self._lock = threading.Lock()  # of the file: readers are threads

    def scan(self) -> Iterator[Place]:
        """Yields (row group, row in it) of every row."""
        row = 0
        for group in range(self._file.metadata.num_row_groups):
            faults = self._faults(group)
            for within in range(self._file.metadata.row_group(group).num_rows):
                key = f"{self.path.stem}-{row}"
                yield Place(group, within, key=key, fault=faults.get(within, ""))
                row += 1

    def digest(self) -> str:
        """Returns a SHA-256 of the text columns and of where the images' data lie."""
        digest = hashlib.sha256()
        for group in range(self._file.metadata.num_row_groups):
            info = self._file.metadata.row_group(group)
            digest.update(f"{info.num_rows} {info.total_byte_size}\0".encode())
            table = self._file.read_row_group(group, columns=self._text_columns)
            digest.update(json.dumps(table.to_pylist(), sort_keys=True, default=str).encode())
        return digest.hexdigest()

    def read(self, place: Place) -> tuple[Sample, tuple[ImagePlace, ...]]:
        """Reads and checks one row."""
        record = dict(self._row(place, images=False))
        name = record["id"] if is_filled(record.get("id")) else place.key
        if place.fault:
            raise RecordError(place.fault, name)
        if isinstance(record.get("conversations"), str):
            try:
                record["conversations"] = decode_json(record["conversations"].encode())
            except DataError as error:
                reason = f"column 'conversations' holds {error}"
                raise RecordError(reason, name) from None
        cells = self._cells(place)
        paths = [_path_of(cell) for cell in cells]
        places = tuple(
            ImagePlace(path or _IN_FILE.format(row=place.length, number=number), number + 1, 1)
            if _bytes_of(cell) is not None
            else ImagePlace(path or "")
            for number, (cell, path) in enumerate(zip(cells, paths, strict=True))
        )
        # The path of an image that lies in the file is a mere name: it may look like anything.
        names = [
            image.name if not image.length else f"{number}" for number, image in enumerate(places)
        ]
        record["image"] = names or None
        sample = parse_record(record, place.key, self._known)
        return replace(sample, ignored=sample.ignored + self._metadata), places

    def image(self, place: Place, image: ImagePlace) -> bytes:
        """Takes an image's bytes out of its row."""
        data = _bytes_of(self._cells(place)[image.offset - 1])
        if data is None:
            raise DataError(f"is no longer in '{self.path}'")
        return data

    def line(self, offset: int) -> str:
        """Row group."""
        return f"row group {offset}"

    def close(self) -> None:
        """Closes the file."""
        for kept in (_TEXTS, _IMAGES):
            kept.drop(self)
        self._file.close()

    def share(self, place: Place) -> float:
        """Share of the file's rows that stand before a place."""
        metadata = self._file.metadata
        before = sum(metadata.row_group(group).num_rows for group in range(place.offset))
        return float((before + place.length) / max(metadata.num_rows, 1))

    def _faults(self, group: int) -> dict[int, str]:
        """Rows of a group that hold something in a column that is neither used nor known."""
        faults: dict[int, str] = {}
        for name in self._unknown:
            column = self._read_group(group, [name]).column(0)
            for row in _filled(column):
                faults.setdefault(row, unknown(f"key '{name}'"))
        return faults

    def _read_group(self, group: int, columns: Sequence[str | None]) -> Any:
        try:
            return self._file.read_row_group(group, columns=columns)
        except Exception as error:  # noqa: BLE001  (pyarrow raises classes of its own)
            reason = " ".join(str(error).split())[:120]
            raise DataError(f"row group {group} is damaged ({reason})") from None

    def _cells(self, place: Place) -> list[Any]:
        if self._image_column is None:
            return []
        value = self._row(place, images=True)[self._image_column]
        if value is None:
            return []
        return list(value) if isinstance(value, list) else [value]

    def _row(self, place: Place, images: bool) -> dict[str, Any]:
        """One row: its text, or its images. Whole row groups are read and some of them kept."""
        kept, columns = (_IMAGES, [self._image_column]) if images else (_TEXTS, self._text_columns)
        with self._lock:  # so that threads do not read one group twice
            table = kept.get(self, place.offset)
            if table is None:
                if self._in_order:
                    kept.drop(self)
                table = self._read_group(place.offset, columns)
                kept.put(self, place.offset, table)
        return dict(table.slice(place.length, 1).to_pylist()[0])


def _filled(column: Any) -> list[int]:
    """Rows of a column that hold anything; null, and a text, bytes or list of length 0, do not."""
    arrow: Any = importlib.import_module("pyarrow")
    compute: Any = importlib.import_module("pyarrow.compute")
    kind, types = column.type, arrow.types
    filled = column.is_valid()
    length = None
    if types.is_list(kind) or types.is_large_list(kind):
        length = compute.list_value_length(column)
    elif kind in (arrow.string(), arrow.large_string(), arrow.binary(), arrow.large_binary()):
        length = compute.binary_length(column)
    if length is not None:
        filled = compute.and_(filled, compute.greater(compute.fill_null(length, 0), 0))
    return [row for row, full in enumerate(filled.to_pylist()) if full]


def _bytes_of(cell: Any) -> bytes | None:
    if isinstance(cell, bytes):
        return cell
    data = cell.get("bytes") if isinstance(cell, dict) else None
    return data if isinstance(data, bytes) else None


def _path_of(cell: Any) -> str | None:
    path = cell.get("path") if isinstance(cell, dict) else cell
    return path if isinstance(path, str) else None
