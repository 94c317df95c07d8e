"""Exact-match accuracy of the digits questions, per category and in all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dattn_mcore.errors import DataError
from dattn_mcore.evaluation.files import write_text
from dattn_mcore.evaluation.questions import Question, read_answers, read_questions


@dataclass(frozen=True)
class Tally:
    """Right answers of a group."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return self.correct / self.total


@dataclass(frozen=True)
class Score:
    """Tallies by category, sorted by name, and over everything."""

    categories: dict[str, Tally]
    overall: Tally

    def to_json(self) -> str:
        """The score as one JSON object."""
        tallies = {"overall": self.overall, **self.categories}
        plain = {
            name: {"correct": t.correct, "total": t.total, "accuracy": t.accuracy}
            for name, t in tallies.items()
        }
        overall = plain.pop("overall")
        return json.dumps({"overall": overall, "categories": plain}, indent=2) + "\n"


def score_digits(questions_path: str | Path, answers_path: str | Path) -> Score:
    """Compares answers with the expected ones, character by character (outer space aside).

    Raises:
        DataError: a file is malformed, a question has no expected answer, or the two files are
            not about the same questions.
    """
    questions = read_questions(questions_path)
    answers = read_answers(answers_path)
    known = {question.question_id for question in questions}
    unanswered = [q.question_id for q in questions if q.question_id not in answers]
    strangers = [question_id for question_id in answers if question_id not in known]
    for ids, what in ((unanswered, "lacks"), (strangers, "has, beyond the questions,")):
        if ids:
            named = ", ".join(repr(i) for i in ids[:5]) + (", ..." if len(ids) > 5 else "")
            raise DataError(
                f"--answers {answers_path} {what} {len(ids)} question ids ({named}); answer this "
                "question file"
            )
    without = [q for q in questions if q.answer is None]
    if without:
        raise DataError(
            f"{questions_path}:{without[0].line}: has no field answer, which the score needs"
        )
    return _tally(questions, answers)


def _tally(questions: Sequence[Question], answers: dict[str | int, str]) -> Score:
    right: dict[str, list[bool]] = {}
    for question in questions:
        assert question.answer is not None
        hit = answers[question.question_id].strip() == question.answer.strip()
        right.setdefault(question.category or "(none)", []).append(hit)
    categories = {name: Tally(sum(hits), len(hits)) for name, hits in sorted(right.items())}
    total = Tally(
        sum(t.correct for t in categories.values()), sum(t.total for t in categories.values())
    )
    return Score(categories, total)


def write_score(path: str | Path, score: Score) -> None:
    """Writes the score as JSON; it appears under its name when whole.

    Raises:
        DataError: it cannot be written.
    """
    write_text(Path(path), score.to_json(), "--json")
