"""Where a record stands, as every message about one says it: file, line or row, form, and field.

The index, `check`, `preview` and training all name a record through `RecordPlaces`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from dattn_mcore.data.sources.place import Place
from dattn_mcore.data.sources.records.images import Cell
from dattn_mcore.data.sources.source import Source, SourceFile
from dattn_mcore.errors import DataError

# Lines are counted from the start of a file; training does not read more of it than this.
MOST_COUNTED = 1 << 30  # bytes


class RecordPlaces:
    """Names the places of records in the files of an index.

    Args:
        files: (number within its source, source) of each file.
        get: Opens a file by its number; may raise DataError.
        most_counted: Bytes of a file whose lines are counted; None: all.
    """

    def __init__(
        self,
        files: Sequence[tuple[int, Source]],
        get: Callable[[int], SourceFile],
        most_counted: int | None = None,
    ) -> None:
        self._files, self._get, self._most_counted = files, get, most_counted

    def where(
        self, file: int, offset: int, record: int, field: str = "", counted: bool = True
    ) -> str:
        """What a message starts with: "'a.jsonl' line 7 (index 6, form llava), field images[1]".

        Args:
            file: Number of the file.
            offset: Of the record (`Place.offset`).
            record: Its number in the file, from 0.
            field: From `field_of`; "" where the record as a whole is meant.
            counted: Whether the file may be read to find the line.
        """
        number, source = self._files[file]
        line = ""
        if counted:
            # A file that has gone: the record is named by its number.
            with contextlib.suppress(DataError, OSError):
                line = f"{self._line(file, offset)} "
        path = source.files[number]
        said = f"'{path}' {line}(index {record}, form {source.form})"
        return f"{said}, field {field}" if field else said

    def field(self, file: int, place: Place, image: str) -> str:
        """The field that names an image of a record; "" where that cannot be said."""
        try:
            return field_of(self._get(file).raw(place), image)
        except (DataError, OSError):
            return ""

    def _line(self, file: int, offset: int) -> str:
        _, source = self._files[file]
        far = self._most_counted is not None and offset > self._most_counted
        if far and source.format == "json":
            return f"byte {offset}"
        return self._get(file).line(offset)


def field_of(record: Any, image: str) -> str:
    """Where an image's name stands in a record, such as `images[1]`; "" if nowhere.

    Args:
        record: As its file holds it (`SourceFile.raw`).
        image: Name of the image: a path below the image folder.
    """
    if isinstance(record, dict):  # an id that is a path names no image
        record = {key: value for key, value in record.items() if key != "id"}
    return _named(record, image, "") or _cell(record)


def _named(value: Any, image: str, path: str) -> str:
    if isinstance(value, str):
        plain = value.removeprefix("file://")
        # An absolute path inside the folder has become one below it.
        same = plain == image or (plain.startswith("/") and plain.endswith(f"/{image}"))
        return path if same else ""
    for inside, where in _children(value, path):
        if found := _named(inside, image, where):
            return found
    return ""


def _children(value: Any, path: str) -> list[tuple[Any, str]]:
    if isinstance(value, dict):
        return [(one, f"{path}.{key}" if path else str(key)) for key, one in value.items()]
    if isinstance(value, list):
        return [(one, f"{path}[{number}]") for number, one in enumerate(value)]
    return []


def _cell(record: Any) -> str:
    """The column of a table's images."""
    if isinstance(record, dict):
        for key, value in record.items():
            if isinstance(value, list) and any(isinstance(one, Cell) for one in value):
                return str(key)
    return ""
