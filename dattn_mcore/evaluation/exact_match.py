"""Exact-match accuracy of a question file's answers, per category and in all."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dattn_mcore.errors import DataError
from dattn_mcore.evaluation.files import write_text
from dattn_mcore.evaluation.guessing import Guess, compare, look_at
from dattn_mcore.evaluation.outcome import Outcome
from dattn_mcore.evaluation.questions import Question, part_of, read_answers, read_questions

Chance = Callable[[str], float | None]  # by category: how often a guess is right; None: unknown


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
class ExactMatch:
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


def unknown_chance(category: str) -> None:
    """For questions of which nobody knows how often a guess is right."""


def score_file(
    questions_path: str | Path,
    answers_path: str | Path,
    chance: Chance = unknown_chance,
    limit: int | None = None,
) -> ExactMatch:
    """Compares an answer file with the answers that a question file expects.

    Args:
        questions_path: question file.
        answers_path: answer file.
        chance: see `score_answers`.
        limit: of the questions; the answers are to that part of them.

    Raises:
        DataError: a file is malformed, a question has no expected answer, or the two files are
            not about the same questions.
    """
    questions = part_of(read_questions(questions_path), limit)
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
    check_expected(questions, questions_path)
    return score_answers(questions, answers, chance)


def check_expected(questions: Sequence[Question], path: str | Path) -> None:
    """Checks that every question says what its answer should be.

    Raises:
        DataError: one (named by its line) does not.
    """
    without = [q for q in questions if q.answer is None]
    if without:
        raise DataError(f"{path}:{without[0].line}: has no field answer, which the score needs")


def score_answers(
    questions: Sequence[Question],
    answers: Mapping[str | int, str],
    chance: Chance = unknown_chance,
) -> ExactMatch:
    """Compares answers with the expected ones, character by character (outer space aside).

    Args:
        questions: each with an expected answer.
        answers: text by question id; of every question.
        chance: how often a guess is right, by category.
    """
    right: dict[str, list[bool]] = {}
    for question in questions:
        assert question.answer is not None
        hit = answers[question.question_id].strip() == question.answer.strip()
        right.setdefault(question.category or "(none)", []).append(hit)
    categories = {name: Tally(sum(hits), len(hits)) for name, hits in sorted(right.items())}
    total = Tally(
        sum(t.correct for t in categories.values()), sum(t.total for t in categories.values())
    )
    guesses = _guesses(right, chance)
    outcomes = [Outcome(float(hit), "", "") for group in right.values() for hit in group]
    odd, broken = look_at([answers[q.question_id] for q in questions], outcomes)
    notes = (*odd, *(note for guess in guesses if (note := guess.note())))
    return ExactMatch(categories, total, tuple(guesses), notes, broken)


def _guesses(right: Mapping[str, Sequence[bool]], chance: Chance) -> list[Guess]:
    """Each category beside guessing where that is known, and overall where it is known of all."""
    levels = {name: level for name in sorted(right) if (level := chance(name)) is not None}
    guesses = [
        guess
        for name, level in levels.items()
        for guess in compare(name, map(float, right[name]), [level] * len(right[name]))
    ]
    if len(levels) == len(right):
        every = [levels[name] for name, hits in right.items() for _ in hits]
        guesses += compare("overall", [float(h) for hits in right.values() for h in hits], every)
    return guesses


def write_score(path: str | Path, score: ExactMatch) -> None:
    """Writes the score as JSON; it appears under its name when whole.

    Raises:
        DataError: it cannot be written.
    """
    write_text(Path(path), score.to_json(), "--json")
