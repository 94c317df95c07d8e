"""Whether a score is better than guessing, and whether answers look as if nobody answered.

Guessing is a choice among a question's options without looking, all equally likely. How many right
answers it gives by luck is a sum of independent draws, whose exact distribution is computed; a
score is better than guessing if luck gives as many right answers in one case of twenty at most.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dattn_mcore.evaluation.outcome import Outcome

LUCK = 0.05  # one-sided: how often guessing may look better than it is
FEWEST = 10  # answers from which on none that is right, or all that are empty, is a fault


@dataclass(frozen=True)
class Guess:
    """One figure beside what guessing gives.

    Attributes:
        figure: which one.
        right: right answers.
        total: questions.
        expected: right answers that guessing gives on average.
        needed: fewest right answers that are better than guessing; more than `total` where the
            questions are too few to tell.
    """

    figure: str
    right: int
    total: int
    expected: float
    needed: int

    @property
    def better(self) -> bool:
        """Whether luck does not explain the figure."""
        return self.right >= self.needed

    @property
    def level(self) -> float:
        """What guessing gives, in percent."""
        return 100 * self.expected / self.total

    def note(self) -> str:
        """One line where the figure is not better than guessing; else nothing."""
        if self.better:
            return ""
        value = f"{self.right} of {self.total} right, {self.level:.1f}% by luck"
        if self.needed > self.total:
            return f"{self.figure}: too few questions to tell it from guessing ({value})"
        return f"{self.figure} is not better than guessing ({value}; {self.needed} would be)"

    def to_json(self) -> dict[str, Any]:
        """All of it."""
        return {**vars(self), "guessing": self.level, "better": self.better}


def compare(figure: str, right: Iterable[float | None], chances: Sequence[float]) -> list[Guess]:
    """Compares a figure with guessing.

    Args:
        figure: its name.
        right: 1 for each right answer; anything less is not right.
        chances: of each question, that a guess is right.

    Returns:
        The comparison; nothing where there are no questions.
    """
    count = sum(credit == 1 for credit in right)
    if not chances:
        return []
    return [Guess(figure, count, len(chances), sum(chances), needed(chances))]


def needed(chances: Sequence[float]) -> int:
    """Fewest right answers that guessing reaches with a probability of `LUCK` at most.

    Args:
        chances: of each question, that a guess is right.

    Returns:
        From 1 to one more than there are questions.
    """
    luck = np.ones(1)
    for chance, count in Counter(chances).items():
        luck = np.convolve(luck, _binomial(count, chance))
    at_least = np.cumsum(luck[::-1])[::-1]  # the small ones are added first
    return int(np.argmax(np.append(at_least, 0.0) <= LUCK))


def _binomial(count: int, chance: float) -> np.ndarray:
    """Probabilities of 0, 1, ..., count right answers."""
    if chance in (0, 1):
        certain = np.zeros(count + 1)
        certain[count * int(chance)] = 1
        return certain
    factorials = np.array([math.lgamma(k + 1) for k in range(count + 1)])
    k = np.arange(count + 1)
    ways = factorials[-1] - factorials - factorials[::-1]
    return np.exp(ways + k * math.log(chance) + (count - k) * math.log1p(-chance))


def count_choices(text: str, unknown: int = 4) -> int:
    """Options of a question that lists them as `A. ...`, `(A) ...` or `A: ...`.

    Args:
        text: the question.
        unknown: what is returned where it lists less than two.
    """
    count = at = 0
    for letter in "ABCDEFGHIJ":
        found = re.compile(rf"(?:^|[\s(,;]){letter}[.:)]").search(text, at)
        if not found:
            break
        count, at = count + 1, found.end()
    return count if count > 1 else unknown


def look_at(
    answers: Sequence[str | None] | None, outcomes: Sequence[Outcome]
) -> tuple[list[str], str]:
    """Notes where answers are all empty, all the same, or none is right.

    Args:
        answers: of each row, None where there is none; None: unknown.
        outcomes: of each row; empty where nothing is scored here.

    Returns:
        Notes, and what is plainly broken: empty, or one line.
    """
    notes = []
    broken = ""
    given = [answer.strip() for answer in answers or () if answer is not None]
    credits = [outcome.credit for outcome in outcomes if outcome.credit is not None]
    if given and not any(given):
        notes.append(broken := f"all {len(given)} answers are empty")
    elif len(given) > 1 and len(set(given)) == 1 and (not credits or min(credits) < 1):
        notes.append(f"all {len(given)} answers are the same ({given[0]!r:.60})")
    if credits and max(credits) <= 0:
        notes.append("no answer is right")
        broken = broken or f"none of {len(credits)} answers is right"
    return notes, broken if max(len(given), len(credits)) >= FEWEST else ""
