"""VQAv2, test-dev, scored by its server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dattn_mcore.errors import DataError
from dattn_mcore.evaluation.benchmarks.base import Benchmark, Row
from dattn_mcore.evaluation.files import read_json_lines
from dattn_mcore.evaluation.text import normalise_answer

ASKED = "llava_vqav2_mscoco_test-dev2015.jsonl"
ALL = "llava_vqav2_mscoco_test2015.jsonl"


class Vqav2(Benchmark):
    """Submission with every id of test2015; those not asked have an empty answer.

    The server rejects a file with the ids of test-dev alone.

    Source: LLaVA's scripts/convert_vqav2_for_submission.py.
    """

    name = "vqav2"
    title = "VQAv2"
    folder = "vqav2"
    full_rows = 107394
    submits = True

    def required(self) -> list[str]:
        """See the interface."""
        return [ASKED, ALL, "test2015"]

    def load_rows(self) -> list[Row]:
        """See the interface."""
        return self.llava_rows(ASKED, "test2015")

    def all_ids(self) -> list[str | int]:
        """Every id of test2015.

        Raises:
            DataError: the file is missing, or lacks an id that is asked.
        """
        path = self.root / ALL
        ids = [record.get("question_id") for _, record in read_json_lines(path, "question file")]
        known = {str(question_id) for question_id in ids}
        strange = [row.question_id for row in self.rows if str(row.question_id) not in known]
        if strange:
            raise DataError(f"{path} has no question {strange[0]!r}, which is asked")
        return [question_id for question_id in ids if question_id is not None]

    def check_truth(self) -> list[str]:
        """See the interface."""
        self.all_ids()
        return []

    def submit(self, answers: Sequence[str | None], folder: Path, name: str) -> Path:
        """See the interface."""
        given = {
            str(row.question_id): normalise_answer(answer)
            for row, answer in zip(self.rows, answers, strict=True)
            if answer is not None
        }
        records = [{"question_id": i, "answer": given.get(str(i), "")} for i in self.all_ids()]
        return self.write(folder, f"{name}.json", records)
