"""LLaVA annotation files: read, checked record by record, before the first step.

A file is a JSON list, or JSON lines, of `{id, image?, conversations: [{from, value}, ...]}`.
`image` is a path below the image folder, or a list of them; `<image>` stands in a human turn
for each. Turns alternate, human first, gpt last.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dattn_mcore.errors import DataError

IMAGE_MARK = "<image>"
_SPEAKERS = ("human", "gpt")


@dataclass(frozen=True, slots=True)
class Sample:
    """One annotation record.

    Attributes:
        id: Annotation id (not necessarily unique in the file).
        images: Image paths relative to the image folder, in the order of their marks.
        turns: Turn texts; even ones are the human's, odd ones the answers.
    """

    id: str
    images: tuple[str, ...]
    turns: tuple[str, ...]


@dataclass(frozen=True)
class Annotations:
    """A whole annotation file.

    Attributes:
        path: Where it was read from.
        samples: Its records, in file order.
        fingerprint: SHA-256 of the file's bytes.
    """

    path: Path
    samples: list[Sample]
    fingerprint: str


def read_annotations(path: str | Path, setting: str = "data.annotations") -> Annotations:
    """Reads and checks an annotation file.

    Args:
        path: A LLaVA JSON file, or JSON lines.
        setting: Configuration key named in error messages.

    Raises:
        DataError: One line that names the file and, where there is one, line and record.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{setting}: file '{path}' does not exist; give the path of a LLaVA JSON")
    if not path.is_file():
        raise DataError(f"{setting}: '{path}' is not a regular file; give a LLaVA JSON file")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{setting}: '{path}' cannot be read ({error.strerror})") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{setting}: '{path}' line {line}: not UTF-8 ({error.reason})") from error
    if text[:4096].lstrip()[:1] == "{":
        records, lines = _parse_lines(text, path, setting)
    else:
        records, lines = _parse_document(text, path, setting), None
    if not records:
        raise DataError(f"{setting}: '{path}' holds no records; a LLaVA JSON is a non-empty list")
    samples = []
    for index, record in enumerate(records):
        try:
            samples.append(parse_record(record))
        except DataError as error:
            line = lines[index] if lines is not None else _line_of_record(text, index)
            name = record.get("id") if isinstance(record, dict) else None
            who = f"record {index}" + (f" (id {name!r})" if name is not None else "")
            raise DataError(f"{setting}: '{path}' line {line}, {who}: {error}") from None
    return Annotations(path, samples, hashlib.sha256(raw).hexdigest())


def parse_record(record: Any) -> Sample:
    """Checks one decoded record.

    Raises:
        DataError: What is wrong with it, without saying where it stands.
    """
    if not isinstance(record, dict):
        raise DataError(f"a record must be an object, got {_kind(record)}")
    if "id" not in record:
        raise DataError("key 'id' is missing")
    name = record["id"]
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise DataError(f"'id' must be a string, got {_kind(name)}")
    images = _images(record.get("image"))
    turns = _turns(record)
    marks = sum(turn.count(IMAGE_MARK) for turn in turns)
    if marks != len(images):
        raise DataError(
            f"{marks} {IMAGE_MARK} mark(s) in the conversation but {len(images)} image(s) in "
            f"'image'; there must be one mark for each image"
        )
    if any(IMAGE_MARK in turn for turn in turns[1::2]):
        raise DataError(f"{IMAGE_MARK} stands in a gpt turn; only human turns may show images")
    return Sample(str(name), images, turns)


def _images(value: Any) -> tuple[str, ...]:
    """Checks `image`: absent or null, one path, or a list of paths."""
    if value is None:
        return ()
    paths = value if isinstance(value, list) else [value]
    for path in paths:
        if not isinstance(path, str):
            raise DataError(f"'image' must be a path or a list of paths, got {_kind(path)}")
        if not path or "\0" in path:
            raise DataError(f"'image' holds the empty or unusable path {path!r}")
        if path.startswith("/"):
            raise DataError(f"image path '{path}' is absolute; it must be relative to the folder")
        if ".." in path.split("/"):
            raise DataError(f"image path '{path}' leaves the image folder ('..' is not allowed)")
    return tuple(paths)


def _turns(record: dict[str, Any]) -> tuple[str, ...]:
    """Checks `conversations`: human and gpt in turn, human first, gpt last."""
    if "conversations" not in record:
        raise DataError("key 'conversations' is missing")
    turns = record["conversations"]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"'conversations' must be a non-empty list, got {_kind(turns)}")
    values = []
    for position, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise DataError(f"turn {position} must be an object, got {_kind(turn)}")
        for key in ("from", "value"):
            if key not in turn:
                raise DataError(f"turn {position}: key '{key}' is missing")
            if not isinstance(turn[key], str):
                raise DataError(
                    f"turn {position}: '{key}' must be a string, got {_kind(turn[key])}"
                )
        if turn["from"] not in _SPEAKERS:
            raise DataError(
                f"turn {position}: 'from' is {turn['from']!r}; it must be 'human' or 'gpt'"
            )
        expected = _SPEAKERS[position % 2]
        if turn["from"] != expected:
            raise DataError(
                f"turn {position} is from {turn['from']!r} where {expected!r} is due; turns "
                "alternate, human first"
            )
        values.append(turn["value"])
    if len(values) % 2:
        raise DataError(f"the last of {len(values)} turns is from 'human'; an answer must follow")
    return tuple(values)


def _parse_document(text: str, path: Path, setting: str) -> list[Any]:
    """Parses a JSON document that must be a list."""
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{setting}: '{path}' line {error.lineno} column {error.colno}: malformed JSON "
            f"({error.msg})"
        ) from None
    except RecursionError:
        raise DataError(f"{setting}: '{path}' is nested too deeply for a LLaVA JSON") from None
    if not isinstance(document, list):
        raise DataError(f"{setting}: '{path}' must hold a list of records, got {_kind(document)}")
    return document


def _parse_lines(text: str, path: Path, setting: str) -> tuple[list[Any], list[int]]:
    """Parses JSON lines. Returns the records and the line number of each."""
    records, lines = [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise DataError(
                f"{setting}: '{path}' line {number} column {error.colno}: malformed JSON line "
                f"({error.msg})"
            ) from None
        lines.append(number)
    return records, lines


def _line_of_record(text: str, index: int) -> int:
    """Finds the line on which record `index` of a well-formed JSON list starts (errors only)."""
    decoder = json.JSONDecoder()
    place = text.index("[") + 1
    for number in range(index + 1):
        while text[place] in " \t\n\r,":
            place += 1
        if number < index:
            _, place = decoder.raw_decode(text, place)
    return text.count("\n", 0, place) + 1


def _kind(value: Any) -> str:
    """Names a JSON value's type, or an emptiness, for messages."""
    if value is None:
        return "null"
    if isinstance(value, list | dict | str) and not value:
        return f"an empty {'list' if isinstance(value, list) else type(value).__name__}"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return names.get(type(value), "a number")
