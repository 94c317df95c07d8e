"""VizWiz, test split, scored by its server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dattn_mcore.errors import DataError
from dattn_mcore.evaluation.benchmarks.base import Benchmark, Row, all_answered
from dattn_mcore.evaluation.text import normalise_answer


class VizWiz(Benchmark):
    """Submission of image and normalised answer; every row must be answered.

    Source: LLaVA's scripts/convert_vizwiz_for_submission.py.
    """

    name = "vizwiz"
    title = "VizWiz"
    folder = "vizwiz"
    full_rows = 8000
    submits = True

    def required(self) -> list[str]:
        """See the interface."""
        return ["llava_test.jsonl", "test"]

    def load_rows(self) -> list[Row]:
        """See the interface."""
        rows = self.llava_rows("llava_test.jsonl", "test")
        for row in rows:
            if not row.pictures:
                raise DataError(
                    f"{self.title}: question {row.question_id!r} has no image; the server's file "
                    "names an answer by its image"
                )
        return rows

    def submit(self, answers: Sequence[str | None], folder: Path, name: str) -> Path:
        """See the interface."""
        texts = all_answered(self.title, self.rows, answers)
        records = [
            {"image": row.pictures[0].name, "answer": normalise_answer(text)}
            for row, text in zip(self.rows, texts, strict=True)
        ]
        return self.write(folder, f"{name}.json", records)
