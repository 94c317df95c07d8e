"""The score of the digits questions beside guessing.

A guess here is the best there is without any sense of place: `bag_of_digits_ceiling`.
"""

from __future__ import annotations

from pathlib import Path

from dattn_mcore.data.digits_questions import bag_of_digits_ceiling
from dattn_mcore.evaluation.exact_match import ExactMatch, score_file


def score_digits(questions_path: str | Path, answers_path: str | Path) -> ExactMatch:
    """Compares answers with the expected ones; see `score_file`.

    Raises:
        DataError: see `score_file`.
    """
    return score_file(questions_path, answers_path, _chance)


def _chance(category: str) -> float | None:
    try:
        return bag_of_digits_ceiling(category)
    except KeyError:  # of another question file
        return None
