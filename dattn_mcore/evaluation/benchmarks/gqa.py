"""GQA, testdev_balanced."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dattn_mcore.errors import DataError
from dattn_mcore.evaluation.benchmarks.base import (
    Benchmark,
    Row,
    all_answered,
    unanswered_note,
)
from dattn_mcore.evaluation.files import read_object, take
from dattn_mcore.evaluation.guessing import compare
from dattn_mcore.evaluation.outcome import Outcome
from dattn_mcore.evaluation.scores import Score, bars, percent

QUESTIONS = "testdev_balanced_questions.json"
FOLDERS = ("data", "data/questions1.2", "data/questions")


class Gqa(Benchmark):
    """Share of predictions equal to the answer, by structural type, open and binary.

    Source: GQA's eval.py without its scene-graph, choices and consistency parts, whose files are
    not released; LLaVA's scripts/convert_gqa_for_eval.py.
    """

    name = "gqa"
    title = "GQA"
    folder = "gqa"
    full_rows = 12578
    scores = True
    submits = True

    def required(self) -> list[str]:
        """See the interface."""
        return ["llava_gqa_testdev_balanced.jsonl", "data/images", self._question_file()]

    def _question_file(self) -> str:
        found = (f"{f}/{QUESTIONS}" for f in FOLDERS if (self.root / f / QUESTIONS).is_file())
        return next(found, f"data/{QUESTIONS}")

    def load_rows(self) -> list[Row]:
        """See the interface."""
        return self.llava_rows("llava_gqa_testdev_balanced.jsonl", "data/images")

    def truths(self) -> list[tuple[str, str]]:
        """Answer and structural type for each row.

        Raises:
            DataError: the official questions are missing or are others.
        """
        path = self.root / self._question_file()
        official = read_object(path, "annotation file")
        truths = []
        for row in self.rows:
            entry = official.get(str(row.question_id))
            if entry is None:
                raise DataError(f"{path} has no question {row.question_id!r}, which is asked")
            where = f"{path}: question {row.question_id!r}"
            kind = take(take(entry, "types", dict, where), "structural", str, where)
            truths.append((take(entry, "answer", str, where), kind))
        return truths

    def score(self, answers: Sequence[str | None]) -> Score:
        """See the interface."""
        truths = self.truths()
        outcomes = []
        for answer, (truth, _) in zip(answers, truths, strict=True):
            parsed = prediction(answer or "")
            outcomes.append(Outcome(float(parsed == truth), parsed, truth))
        kinds = [kind for _, kind in truths]
        open_, binary = (
            [o for o, kind in zip(outcomes, kinds, strict=True) if (kind == "query") == is_open]
            for is_open in (True, False)
        )
        return Score(
            "accuracy",
            percent(outcomes),
            figures={"open": percent(open_), "binary": percent(binary)},
            categories=bars(kinds, outcomes),
            notes=unanswered_note(answers),
            outcomes=outcomes,
            # Yes or no, or one of two things that the question names; open ones have no options.
            guesses=compare("binary", [o.credit for o in binary], [0.5] * len(binary)),
        )

    def submit(self, answers: Sequence[str | None], folder: Path, name: str) -> Path:
        """The predictions file of GQA's eval.py."""
        records = [
            {"questionId": str(row.question_id), "prediction": prediction(answer)}
            for row, answer in zip(
                self.rows, all_answered(self.title, self.rows, answers), strict=True
            )
        ]
        return self.write(folder, f"{name}.json", records)


def prediction(text: str) -> str:
    """An answer as GQA's evaluator compares it."""
    return text.rstrip(".").lower()
