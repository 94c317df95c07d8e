"""What the report shows of one benchmark."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Sample:
    """One row as the report shows it.

    Attributes:
        question: as asked.
        images: small JPEGs, base64.
        truth: what would have been right; empty if unknown.
        answers: of each run.
        credits: of each run, None where not scored.
        number: the row's.
    """

    question: str
    images: list[str]
    truth: str
    answers: list[str]
    credits: list[float | None]
    number: int


@dataclass
class Section:
    """One benchmark: its entry of each run's scores, and samples by heading."""

    name: str
    title: str
    entries: list[dict[str, Any]]
    samples: dict[str, list[Sample]] = field(default_factory=dict)
