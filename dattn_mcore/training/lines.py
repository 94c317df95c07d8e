"""JSON lines of a run's folder: written as it goes, and cut back where a resumed run goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO


def open_lines(path: Path) -> TextIO:
    """A file that is appended to line by line."""
    return open(path, "a", encoding="utf-8", buffering=1)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the whole lines of a file; none where it is absent."""
    if not path.exists():
        return
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:  # the last line of a run that was killed
                continue
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield row


def drop_after(path: Path, step: int) -> None:
    """Removes lines of steps that a resumed run will do again."""
    if not path.exists():
        return
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as kept:
        for row in read_lines(path):
            if row["step"] <= step:
                kept.write(json.dumps(row) + "\n")
    os.replace(temporary, path)
