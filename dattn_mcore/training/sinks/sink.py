"""What a sink is given, and what it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

Kind = Literal["train", "validation", "scores"]
Value = float | int | None


@dataclass(frozen=True)
class Row:
    """Numbers of one moment of a run.

    Attributes:
        kind: what they describe: the training steps of an interval, a pass over the held-out
            samples, or the answers to evaluation questions.
        step: optimizer steps done by then.
        last_step: steps after which the run is complete.
        values: by name, without the kind; None where there is nothing to measure.
    """

    kind: Kind
    step: int
    last_step: int
    values: dict[str, Value]


@dataclass(frozen=True)
class Example:
    """A question with an image and the model's answer, for sinks that can show it.

    Attributes:
        image: file, or None for a question without.
        question: text.
        answer: of the model.
        reference: what would be right; "" where there is no single one.
    """

    image: Path | None
    question: str
    answer: str
    reference: str = ""


class Sink(Protocol):
    """A place that rows go to."""

    def write(self, row: Row) -> None:
        """Takes one row."""

    def show(self, kind: Kind, step: int, examples: Sequence[Example]) -> None:
        """Takes a few examples; a sink without pictures leaves them."""

    def close(self) -> None:
        """After the last row."""
