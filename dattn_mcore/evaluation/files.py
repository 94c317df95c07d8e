"""Reads and writes the files of benchmarks: JSON, JSON lines, TSV; every mistake is one line."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from dattn_mcore.errors import DataError

# What pandas.read_table takes for a missing value, and LLaVA's "none": MMBench's files need it.
MISSING_CELLS = frozenset(
    {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"}
    | {"<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null", "none", "NAN", "NONE"}
)

T = TypeVar("T")
# Escapes of which two make one character; half of one is no text, and no file can hold it.
_HALF_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")
_KINDS = {str: "text", int: "a whole number", list: "a list", dict: "an object"}


def read_text(path: Path, what: str) -> str:
    """Text of a UTF-8 file.

    Raises:
        DataError: it is missing, unreadable or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{what} {path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise DataError(f"{what} {path} is not UTF-8 text") from None


def parse_json(text: str) -> Any:
    """Value of JSON that anybody may have written.

    Raises:
        ValueError: it is no JSON, is nested too deeply to be read, or holds half a character, which
            could not be written again.
    """
    try:
        value = json.loads(text)
        if _HALF_ESCAPED.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("brackets are nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("half a character, such as \\ud800 alone") from None
    return value


def read_json(path: Path, what: str) -> Any:
    """Value of a JSON file.

    Raises:
        DataError: it is missing, or no JSON.
    """
    try:
        return parse_json(read_text(path, what))
    except ValueError as error:
        raise DataError(f"{what} {path} is not JSON ({error})") from None


def read_object(path: Path, what: str) -> dict[str, Any]:
    """The object of a JSON file.

    Raises:
        DataError: it is missing, no JSON, or JSON of another kind.
    """
    value = read_json(path, what)
    if not isinstance(value, dict):
        raise DataError(f"{what} {path} must be a JSON object, it is {str(value)[:40]!r}")
    return value


def read_json_lines(path: Path, what: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers, from 1, and objects of a JSON lines file; empty lines are passed over.

    Raises:
        DataError: the file is missing, or a line (named) is no JSON object.
    """
    for number, line in enumerate(read_text(path, what).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError as error:
            raise DataError(
                f"{path}:{number}: is not JSON ({error}); write one object a line"
            ) from None
        if not isinstance(record, dict):
            raise DataError(f"{path}:{number}: must be a JSON object, it is {line.strip()[:40]!r}")
        yield number, record


def take(record: Any, name: str, kind: type[T], where: str) -> T:
    """A field of a JSON object, which must be of one kind.

    Args:
        record: the object.
        name: of the field.
        kind: `str`, `int`, `list` or `dict`.
        where: what messages call the object.

    Raises:
        DataError: the record is no object, or the field is not there or of another kind.
    """
    if not isinstance(record, dict):
        raise DataError(f"{where} must be a JSON object, it is {str(record)[:40]!r}")
    value = record.get(name)
    if value is None:
        raise DataError(f"{where} has no {name}")
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(f"{where}: {name} is {str(value)[:40]!r}; it must be {_KINDS[kind]}")
    return value


def read_tsv(path: Path, what: str) -> tuple[list[str], list[dict[str, str | None]]]:
    """Columns and rows of a tab-separated file with a header; missing cells are None.

    Raises:
        DataError: it is missing, or a row has another number of cells than the header.
    """
    csv.field_size_limit(sys.maxsize)  # images stand in cells
    rows: list[dict[str, str | None]] = []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file, delimiter="\t")
            header = next(reader, [])
            for cells in reader:
                if len(cells) != len(header):
                    raise DataError(
                        f"{path}:{reader.line_num}: has {len(cells)} cells, the header has "
                        f"{len(header)}; the file is cut or damaged"
                    )
                values = (None if cell in MISSING_CELLS else cell for cell in cells)
                rows.append(dict(zip(header, values, strict=True)))
    except OSError as error:
        raise DataError(f"{what} {path} cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{what} {path} is no tab-separated UTF-8 text ({error})") from None
    return header, rows


def write_text(path: Path, text: str, what: str) -> Path:
    """Writes a file that appears under its name when whole; makes its folder.

    Raises:
        DataError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except (OSError, UnicodeEncodeError) as error:
        with contextlib.suppress(OSError):  # the folder may be none
            temporary.unlink()
        reason = getattr(error, "strerror", None) or "it holds half a character"
        raise DataError(f"{what} {path} cannot be written ({reason})") from None
    return path


def write_json_lines(path: Path, records: list[dict[str, Any]], what: str) -> Path:
    """Writes one object a line; see `write_text`."""
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return write_text(path, "".join(lines), what)
