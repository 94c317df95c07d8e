"""Exact-match accuracy of the digits questions, per category and in all, beside guessing.

A guess here is the best there is without any sense of place: `bag_of_digits_ceiling`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dattn_mcore.data.digits_questions import bag_of_digits_ceiling
from dattn_mcore.errors import DataError
from dattn_mcore.evaluation.files import write_text
from dattn_mcore.evaluation.guessing import Guess, compare, look_at
from dattn_mcore.evaluation.questions import Question, read_answers, read_questions
from dattn_mcore.evaluation.scores import Outcome


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
class DigitsScore:
    """Tallies by category, sorted by name, and over everything.

    Attributes:
        guesses: of each category with a level of guessing, and overall where all have one.
        notes: where a tally is not better than guessing, or answers are odd.
        broken: why the answers cannot be a working model's; empty: they can.
    """

    categories: dict[str, Tally]
    overall: Tally
    guesses: tuple[Guess, ...] = ()
    notes: tuple[str, ...] = ()
    broken: str = ""

    def guessing(self, name: str) -> float | None:
        """What guessing gives in a category (or `overall`), 0 to 1; None: unknown."""
        levels = {guess.figure: guess.level / 100 for guess in self.guesses}
        return levels.get(name)

    def to_json(self) -> str:
        """The score as one JSON object."""
        tallies = {"overall": self.overall, **self.categories}
        plain = {
            name: {"correct": t.correct, "total": t.total, "accuracy": t.accuracy}
            for name, t in tallies.items()
        }
        overall = plain.pop("overall")
        value = {
            "overall": overall,
            "categories": plain,
            "compared": [guess.to_json() for guess in self.guesses],
            "notes": list(self.notes),
            "broken": self.broken,
        }
        return json.dumps(value, indent=2) + "\n"


def score_digits(questions_path: str | Path, answers_path: str | Path) -> DigitsScore:
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


def _tally(questions: Sequence[Question], answers: dict[str | int, str]) -> DigitsScore:
    right: dict[str, list[bool]] = {}
    for question in questions:
        assert question.answer is not None
        hit = answers[question.question_id].strip() == question.answer.strip()
        right.setdefault(question.category or "(none)", []).append(hit)
    categories = {name: Tally(sum(hits), len(hits)) for name, hits in sorted(right.items())}
    total = Tally(
        sum(t.correct for t in categories.values()), sum(t.total for t in categories.values())
    )
    guesses = [
        guess
        for name, hits in sorted(right.items())
        if (chance := _chance(name)) is not None
        for guess in compare(name, map(float, hits), [chance] * len(hits))
    ]
    if len(guesses) == len(right):
        every = [chance for name, hits in right.items() for chance in [_chance(name)] * len(hits)]
        hits = [float(hit) for group in right.values() for hit in group]
        guesses += compare("overall", hits, [chance or 0.0 for chance in every])
    outcomes = [Outcome(float(hit), "", "") for group in right.values() for hit in group]
    odd, broken = look_at([answers[q.question_id] for q in questions], outcomes)
    notes = (*odd, *(note for guess in guesses if (note := guess.note())))
    return DigitsScore(categories, total, tuple(guesses), notes, broken)


def _chance(category: str) -> float | None:
    try:
        return bag_of_digits_ceiling(category)
    except KeyError:  # of another question file
        return None


def write_score(path: str | Path, score: DigitsScore) -> None:
    """Writes the score as JSON; it appears under its name when whole.

    Raises:
        DataError: it cannot be written.
    """
    write_text(Path(path), score.to_json(), "--json")
