"""Rows as JSON lines in the run's folder: metrics.jsonl, validation.jsonl, scores.jsonl."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from dattn_mcore.training.lines import drop_after, open_lines
from dattn_mcore.training.sinks.sink import Example, Kind, Row

FILES: dict[Kind, str] = {
    "train": "metrics.jsonl",
    "validation": "validation.jsonl",
    "scores": "scores.jsonl",
}


class JsonLinesSink:
    """Appends each row to the file of its kind; rows of steps that are done again are removed.

    Args:
        run_dir: the run's folder.
        first_step: step the run starts or resumes at.
    """

    def __init__(self, run_dir: Path, first_step: int) -> None:
        self._run_dir = run_dir
        self._open: dict[Kind, TextIO] = {}
        for name in FILES.values():
            drop_after(run_dir / name, first_step)
        self._file("train")  # the run's own file is there from its start

    def write(self, row: Row) -> None:
        """Appends the row.

        Raises:
            OSError: the disk is full; the run ends with that reason.
        """
        file = self._file(row.kind)
        json.dump({"step": row.step, **row.values}, file)
        file.write("\n")

    def show(self, kind: Kind, step: int, examples: Sequence[Example]) -> None:
        """Examples stand in files of their own (scores/)."""

    def close(self) -> None:
        """Closes the files."""
        for file in self._open.values():
            file.close()

    def _file(self, kind: Kind) -> TextIO:
        if kind not in self._open:
            self._open[kind] = open_lines(self._run_dir / FILES[kind])
        return self._open[kind]
