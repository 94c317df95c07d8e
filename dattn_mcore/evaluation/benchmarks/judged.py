"""What benchmarks share whose answers a language model judges."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from dattn_mcore.errors import DataError
from dattn_mcore.evaluation.benchmarks.base import Benchmark
from dattn_mcore.evaluation.scores import Score


class Judged(Benchmark):
    """A benchmark that is scored from judgements (reviews)."""

    judged = True
    temperature: ClassVar[float]
    max_tokens: ClassVar[int]
    reminder: ClassVar[str] = ""  # added to the request after a reply that holds no score

    def coverage(self) -> list[str]:
        """See the interface; `check_reviews` says it of the reviews."""
        return []

    @abstractmethod
    def conversations(self, answers: Sequence[str | None]) -> list[list[dict[str, str]]]:
        """What the judge is asked about each row, as chat messages.

        Raises:
            DataError: a row has no answer, or a file the judge needs is missing.
        """

    @abstractmethod
    def read_judgement(self, content: str) -> list[float] | None:
        """The figures in a judge's reply; None: it holds none."""

    @abstractmethod
    def review(self, number: int, content: str, figures: list[float] | None) -> dict[str, Any]:
        """The line of the review file about a row; `figures` None: the judgement failed."""

    @abstractmethod
    def score_reviews(self, reviews: Sequence[dict[str, Any]]) -> Score:
        """Scores the lines of a review file; failed judgements are counted and left out.

        Raises:
            DataError: a line is malformed, or no judgement succeeded.
        """


def is_figure(value: Any) -> bool:
    """Whether a value of a review file is a number that can be averaged."""
    kind = isinstance(value, int | float) and not isinstance(value, bool)
    return kind and math.isfinite(value)


def check_reviews(benchmark: Judged, reviews: Sequence[dict[str, Any]]) -> list[str]:
    """Looks at the questions of a review file; returns a note where it is not about all of them.

    Raises:
        DataError: a question is judged twice, which would weigh it twice.
    """
    seen: dict[str, int] = {}
    for number, review in enumerate(reviews, start=1):
        question_id = review.get("question_id")
        if question_id is None:
            continue
        first = seen.setdefault(str(question_id), number)
        if first != number:
            raise DataError(
                f"review {number} of {benchmark.title} is about question {question_id!r}, which "
                f"review {first} is about already; keep one of them"
            )
    count, full = len(reviews), benchmark.full_rows
    return [f"{count} reviews; the released file has {full} questions"] * (count != full)


def failed_note(failed: int, total: int, as_original: bool) -> list[str]:
    """A note where judgements failed."""
    done = "averaged in, as in the original" if as_original else "left out of the score"
    return [f"{failed} of {total} judgements failed; {done}"] * (failed > 0)
