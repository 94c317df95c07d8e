"""What parquet files and Arrow files of `datasets` have in common: a row is a record.

Columns are the keys of a record of any form in `records/` (lists of objects also as JSON text).
`image` or `images` holds bytes, {bytes, path} (the Image feature of `datasets`), a path below the
image folder, or a list of any of these.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dattn_mcore.data.sources.metadata import METADATA, is_filled, unused
from dattn_mcore.data.sources.place import ImagePlace, Place
from dattn_mcore.data.sources.record import Inside, RecordError, Sample, decode_json
from dattn_mcore.data.sources.records.draft import Form
from dattn_mcore.data.sources.records.forms import FORMS, parse_record
from dattn_mcore.data.sources.records.images import Cell, bytes_of, check_image_object
from dattn_mcore.data.sources.records.llava import LLAVA
from dattn_mcore.errors import ConfigError, DataError
from dattn_mcore.parallel.packages import import_problem

_IN_FILE = "row {row} image {number}"
_IMAGES = ("image", "images")
_MAY_BE_JSON = ("conversations", "messages", "branches", "texts")
_TOOLS = ("tools", "tool_calls", "function_call")
_ANY_FORM = frozenset(key for form in FORMS.values() for key in form.used)


def arrow_module(name: str, what: str) -> Any:
    """A module of pyarrow, which is an optional package.

    Args:
        name: Dotted name.
        what: Says what needs it, for the message.

    Raises:
        ConfigError: It cannot be imported.
    """
    if problem := import_problem(name):
        raise ConfigError(f"{what}, and pyarrow {problem}; install the extra 'parquet'")
    return importlib.import_module(name)


class TableFile(ABC):
    """A file of rows in groups, as `SourceFile` describes it."""

    def __init__(
        self,
        path: Path,
        image_folder: str,
        names: Sequence[str],
        known: Collection[str] = METADATA,
        form: Form | None = LLAVA,
        called: Path | None = None,
    ) -> None:
        """Chooses the columns.

        Args:
            path: The file.
            image_folder: Folder of the images that lie beside it.
            names: Of its columns.
            known: Names of metadata.
            form: Of its rows; None: not known yet, and `raw` alone may be called.
            called: The file as the user named it, where `path` is the unpacked copy of it.

        Raises:
            DataError: It lacks a column.
        """
        self.path, self._stem = called or path, path.stem
        self.image_folder: str | None = image_folder
        self._form, self._known = form or LLAVA, known
        used = _ANY_FORM if form is None else form.used
        turns = {"conversations", "branches"} & set(names)
        # One without rows may lack columns, too: an empty shard of many.
        if form is not None and form.name == LLAVA.name and not turns and any(self.group_rows()):
            raise DataError(f"'{self.path}' has no column 'conversations', only {', '.join(names)}")
        self._image_column = next((name for name in _IMAGES if name in names), None)
        self._text_columns = [name for name in names if name in used and name not in _IMAGES]
        others = [name for name in names if name not in (*self._text_columns, self._image_column)]
        self._metadata = tuple(name for name in others if name.casefold() in known)
        # Where the form is not known yet, neither is what it uses.
        self._unknown = [name for name in others if name.casefold() not in known and form]

    @abstractmethod
    def group_rows(self) -> list[int]:
        """Rows of each group."""

    @abstractmethod
    def read_group(self, group: int, columns: Sequence[str]) -> Any:
        """Some columns of a group, as an Arrow table.

        Raises:
            DataError: The group is damaged.
        """

    @abstractmethod
    def group_table(self, group: int, images: bool) -> Any:
        """The text columns of a group, or its column of images; the groups used last are kept."""

    @abstractmethod
    def close(self) -> None:
        """Closes the file."""

    def scan(self) -> Iterator[Place]:
        """Yields (group, row in it) of every row."""
        row = 0
        for group, rows in enumerate(self.group_rows()):
            faults = self._faults(group)
            for within in range(rows):
                key = f"{self._stem}-{row}"
                yield Place(group, within, key=key, fault=faults.get(within, ""))
                row += 1

    def digest(self) -> str:
        """Returns a SHA-256 of the text columns and of the sizes of groups."""
        digest = hashlib.sha256()
        for group, size in enumerate(self.group_sizes()):
            digest.update(f"{size}\0".encode())
            table = self.read_group(group, self._text_columns)
            digest.update(json.dumps(table.to_pylist(), sort_keys=True, default=str).encode())
        return digest.hexdigest()

    @abstractmethod
    def group_sizes(self) -> list[str]:
        """Rows and bytes of each group, which tell where the data of images lie."""

    def read(self, place: Place) -> tuple[Sample, tuple[ImagePlace, ...]]:
        """Reads and checks one row."""
        sample = self._sample(place)
        places = tuple(
            ImagePlace(image)
            if isinstance(image, str)
            else ImagePlace(
                image.name if isinstance(image.data, int) else f"{image.name} ({number})", number, 1
            )
            for number, image in enumerate(sample.images, 1)
        )
        return sample, places

    def raw(self, place: Place) -> Any:
        """A row's text; instead of its images what stands for one of them."""
        record = self._texts(place, place.key)
        if self._image_column is not None:
            record[self._image_column] = [Cell(0, "an image")]
        return record

    def image(self, place: Place, image: ImagePlace) -> bytes:
        """Takes an image's bytes out of its row."""
        images = self._sample(place).images
        inside = images[image.offset - 1] if image.offset <= len(images) else None
        if isinstance(inside, Inside) and not isinstance(inside.data, int):
            return bytes_of(inside)
        data = None
        if isinstance(inside, Inside):
            assert isinstance(inside.data, int)
            data = _bytes_of(self._cells(place)[inside.data])
        if data is None:
            raise DataError(f"is no longer in '{self.path}'")
        return data

    def share(self, place: Place) -> float:
        """Share of the file's rows that stand before a place."""
        rows = self.group_rows()
        return (sum(rows[: place.offset]) + place.length) / max(sum(rows), 1)

    def _sample(self, place: Place) -> Sample:
        record = self._texts(place, place.key)
        name = record["id"] if is_filled(record.get("id")) else place.key
        if place.fault:
            raise RecordError(place.fault, name)
        if self._image_column is not None:
            cells = self._cells(place)
            shown = [_shown(cell, place.length, number) for number, cell in enumerate(cells)]
            record[self._form.image_key] = shown or None
        folder = self.image_folder or ""
        sample = parse_record(record, place.key, self._known, self._form, folder=folder)
        return replace(sample, ignored=sample.ignored + self._metadata)

    def _texts(self, place: Place, key: str) -> dict[str, Any]:
        record = self._row(place, images=False)
        for name in _MAY_BE_JSON:
            if isinstance(record.get(name), str):
                try:
                    record[name] = decode_json(record[name].encode())
                except DataError as error:
                    named = record["id"] if is_filled(record.get("id")) else key
                    raise RecordError(f"column '{name}' holds {error}", named) from None
        return record

    def _cells(self, place: Place) -> list[Any]:
        if self._image_column is None:
            return []
        value = self._row(place, images=True)[self._image_column]
        if value is None:
            return []
        return list(value) if isinstance(value, list) else [value]

    def _row(self, place: Place, images: bool) -> dict[str, Any]:
        table = self.group_table(place.offset, images)
        return dict(_without_added(table.slice(place.length, 1).to_pylist()[0]))

    def image_columns(self) -> list[str]:
        """The column of images, if there is one."""
        return [self._image_column] if self._image_column is not None else []

    def _faults(self, group: int) -> dict[int, str]:
        """Rows of a group that hold something in a column that is neither used nor known."""
        faults: dict[int, str] = {}
        for name in self._unknown:
            column = self.read_group(group, [name]).column(0)
            for row in _filled(column):
                faults.setdefault(row, unused(f"key '{name}'", name))
        return faults


def _without_added(value: Any, tools: bool = False) -> Any:
    """A row without the nulls that its table has added to tools and calls of tools.

    All rows of a table have the same keys, so arguments of every call get those of all others.
    Elsewhere a null is what was written, or counts as absent.
    """
    if isinstance(value, list):
        return [_without_added(item, tools) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _without_added(item, tools or key in _TOOLS)
        for key, item in value.items()
        if item is not None or not tools
    }


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


def _shown(cell: Any, row: int, number: int) -> Any:
    """What stands for an image in a record: a place inside the table, a path, or nothing.

    Raises:
        DataError: The cell holds more than an image.
    """
    if isinstance(cell, dict):
        check_image_object(cell, f"image {number}")
    path = cell.get("path") if isinstance(cell, dict) else cell
    path = path if isinstance(path, str) else None
    if _bytes_of(cell) is not None:
        return Cell(number, path or _IN_FILE.format(row=row, number=number))
    return cell if isinstance(cell, str) else path


def _bytes_of(cell: Any) -> bytes | None:
    if isinstance(cell, bytes):
        return cell
    data = cell.get("bytes") if isinstance(cell, dict) else None
    return data if isinstance(data, bytes) else None
