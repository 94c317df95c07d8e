"""What became of one answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """What became of one answer.

    Attributes:
        credit: 0 to 1; None where nothing was scored (a failed judgement).
        parsed: what the scorer read in the answer.
        truth: what would have been right.
    """

    credit: float | None
    parsed: str
    truth: str
