"""JSON (one list) and JSON lines, scanned for the places of records without parsing them.

The scanner works on the bytes of the mapped file: a record is what stands between matching braces,
strings skipped as a whole. So a record that is malformed inside, or not UTF-8, is one bad sample;
only a file whose brackets do not match is refused as a whole.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import mmap
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from dattn_mcore.data.sources.metadata import METADATA
from dattn_mcore.data.sources.place import ImagePlace, Place
from dattn_mcore.data.sources.record import Inside, Sample, decode_json
from dattn_mcore.data.sources.records.draft import Form
from dattn_mcore.data.sources.records.forms import parse_record
from dattn_mcore.data.sources.records.images import bytes_of
from dattn_mcore.data.sources.records.llava import LLAVA
from dattn_mcore.data.sources.unpack import hold
from dattn_mcore.errors import DataError

_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(rb"[ \t\r\n]*")
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\]]', re.DOTALL)
_SCALAR = re.compile(rb'(?:"[^"\\]*(?:\\.[^"\\]*)*"|[^,\[\]{}"])+', re.DOTALL)
_MOST_LOOKED_AT = 64 << 20  # bytes that are searched for one object over many lines
_PART = 1 << 20  # bytes that are counted at once
_OPEN, _CLOSE = frozenset(b"{["), frozenset(b"}]")


class JsonFile:
    """A JSON file, as `SourceFile` describes it."""

    def __init__(
        self,
        path: Path,
        image_folder: str,
        known: Collection[str] = METADATA,
        form: Form = LLAVA,
        called: Path | None = None,
    ) -> None:
        """Opens the file.

        Args:
            path: The file.
            image_folder: See SourceFile.
            known: Names of metadata.
            form: Of its records.
            called: The file as the user named it, where `path` is the unpacked copy of it.

        Raises:
            DataError: It cannot be opened.
        """
        self.path = called or path
        self.image_folder: str | None = image_folder
        self._known, self._form = known, form
        self._name = path.name.encode("utf-8", "replace").decode()  # every message can show it
        try:
            self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"'{self.path}' cannot be read ({error.strerror})") from None
        if called is not None:
            hold(self._handle)
        self._lines_to = (0, 1)  # an offset, and the line it is on
        self._line_of_part = [1]  # line at the start of each part of the file that was counted

    def scan(self) -> Iterator[Place]:
        """Yields the place of every record; raises DataError with line and column."""
        size = os.fstat(self._handle).st_size
        if size == 0:
            raise DataError(
                f"'{self.path}' is empty; it must be a non-empty list of samples, or one object "
                "per line"
            )
        with mmap.mmap(self._handle, size, access=mmap.ACCESS_READ) as data:
            start = 3 if data[:3] == _BOM else 0
            start = _skip_space(data, start)
            if data[start : start + 1] == b"[":
                yield from self._scan_list(data, start + 1)
            else:
                self._check_first_line(data, start)
                yield from self._scan_lines(data, start)

    def digest(self) -> str:
        """Returns the SHA-256 of the file."""
        digest = hashlib.sha256()
        place = 0
        while part := os.pread(self._handle, 1 << 20, place):
            digest.update(part)
            place += len(part)
        return digest.hexdigest()

    def read(self, place: Place) -> tuple[Sample, tuple[ImagePlace, ...]]:
        """Reads and checks one record."""
        sample = parse_record(
            self.raw(place), place.key, self._known, self._form, folder=self.image_folder or ""
        )
        places = tuple(
            ImagePlace(image) if isinstance(image, str) else ImagePlace(image.name, number, 1)
            for number, image in enumerate(sample.images, 1)
        )
        return sample, places

    def raw(self, place: Place) -> Any:
        """Reads and decodes one record."""
        try:
            raw = os.pread(self._handle, place.length, place.offset)
        except OSError as error:
            raise DataError(f"cannot be read from '{self.path}' ({error.strerror})") from None
        return decode_json(raw)

    def image(self, place: Place, image: ImagePlace) -> bytes:
        """Decodes an image that lies in its record."""
        images = self.read(place)[0].images
        inside = images[image.offset - 1] if image.offset <= len(images) else None
        if not isinstance(inside, Inside):
            raise DataError(f"is no longer in '{self.path}'")
        return bytes_of(inside)

    def share(self, place: Place) -> float:
        """Share of the bytes before a record."""
        return place.offset / max(os.fstat(self._handle).st_size, 1)

    def line(self, offset: int) -> str:
        """Line of a byte; cheap for rising offsets, and what was counted is not read again."""
        lines = self._line_of_part
        while len(lines) <= offset // _PART:
            part = os.pread(self._handle, _PART, (len(lines) - 1) * _PART)
            lines.append(lines[-1] + part.count(b"\n"))
        start = offset // _PART * _PART
        known = start <= self._lines_to[0] <= offset
        before, line = self._lines_to if known else (start, lines[offset // _PART])
        line += os.pread(self._handle, offset - before, before).count(b"\n")
        self._lines_to = (offset, line)
        return f"line {line}"

    def close(self) -> None:
        """Closes the file."""
        os.close(self._handle)

    def _scan_list(self, data: mmap.mmap, place: int) -> Iterator[Place]:
        """Walks over the elements of a list, from behind its opening bracket."""
        place = _skip_space(data, place)
        if data[place : place + 1] == b"]":
            self._check_end(data, place + 1)
            return
        for number in itertools.count():
            end = self._element_end(data, place)
            yield Place(place, end - place, key=f"{self._name}[{number}]")
            place = _skip_space(data, end)
            separator = data[place : place + 1]
            if separator == b"]":
                self._check_end(data, place + 1)
                return
            if separator != b",":
                raise self._malformed(place, "',' or ']' expected after a record")
            place = _skip_space(data, place + 1)

    def _element_end(self, data: mmap.mmap, start: int) -> int:
        """Returns where the element that starts at `start` ends."""
        if data[start : start + 1] not in (b"{", b"["):
            match = _SCALAR.match(data, start)
            if match is None:
                raise self._malformed(start, "a record expected")
            return match.end()
        depth = 0
        for token in _TOKEN.finditer(data, start):
            first = data[token.start()]
            if first in _OPEN:
                depth += 1
            elif first in _CLOSE:
                depth -= 1
                if depth == 0:
                    return token.end()
        raise self._malformed(start, "this record never ends")

    def _check_first_line(self, data: mmap.mmap, start: int) -> None:
        """Refuses an object over several lines: each of them would be reported as a bad sample."""
        if data[start : start + 1] != b"{" or len(data) > _MOST_LOOKED_AT:
            return
        line = data[start : data.find(b"\n", start) + 1 or len(data)]
        try:
            json.loads(line)
            return  # every trainer comes here, and most files end here
        except (ValueError, RecursionError):
            pass
        text = data[start:].decode("utf-8", "replace")
        try:
            found, end = json.JSONDecoder().raw_decode(text)
        except (ValueError, RecursionError):
            return  # a damaged line: one bad sample
        if "\n" in text[:end]:
            keys = ", ".join(f"'{key}'" for key in list(found)[:3])
            raise DataError(
                f"'{self.path}' starts with a JSON object over several lines (keys {keys}); "
                "it must be a list of samples, or one object per line"
            )

    def _check_end(self, data: mmap.mmap, place: int) -> None:
        place = _skip_space(data, place)
        if place < len(data):
            raise self._malformed(place, "nothing may stand behind the list")

    def _scan_lines(self, data: mmap.mmap, start: int) -> Iterator[Place]:
        line = 1 + data[:start].count(b"\n")
        while start < len(data):
            end = data.find(b"\n", start)
            end = len(data) if end < 0 else end
            # A line without anything but space is no record.
            if data[start:end].strip():
                yield Place(start, end - start, key=f"{self._name}:{line}")
            start, line = end + 1, line + 1

    def _malformed(self, place: int, what: str) -> DataError:
        return DataError(f"'{self.path}' {self.line(place)}: malformed JSON ({what})")


def _skip_space(data: mmap.mmap, place: int) -> int:
    match = _SPACE.match(data, place)
    assert match is not None  # it matches nothing as well
    return match.end()
