"""What a scorer returns: one headline figure, further figures, and what became of every answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dattn_mcore.evaluation.guessing import Guess, look_at
from dattn_mcore.evaluation.outcome import Outcome


@dataclass(frozen=True)
class Bar:
    """One category's figure.

    Attributes:
        value: in the unit of its score.
        count: rows behind it.
        most: the largest value possible.
    """

    value: float
    count: int
    most: float = 100.0


@dataclass(frozen=True)
class Score:
    """The score of one benchmark.

    Attributes:
        metric: name of the headline figure.
        value: headline figure.
        unit: "%" or "points".
        figures: all further figures by name.
        categories: figure of each category.
        notes: what a reader must know to compare the score.
        outcomes: one for each row, in the order of rows.
        guessing: what guessing gives, in the unit of the headline figure; None: no such level.
        guesses: figures compared with guessing.
        broken: why the answers cannot be a working model's; empty: they can.
    """

    metric: str
    value: float
    unit: str = "%"
    figures: dict[str, float] = field(default_factory=dict)
    categories: dict[str, Bar] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    guessing: float | None = None
    guesses: list[Guess] = field(default_factory=list)
    broken: str = ""

    def looked_at(
        self, answers: Sequence[str | None] | None, coverage: Sequence[str] = ()
    ) -> Score:
        """The score with notes where it is not better than guessing, or its answers are odd.

        Args:
            answers: of each row, None where there is none; None: unknown.
            coverage: notes about the rows that it is over.
        """
        notes, broken = look_at(answers, self.outcomes)
        notes += [note for guess in self.guesses if (note := guess.note())]
        return replace(self, notes=[*notes, *self.notes, *coverage], broken=broken)

    def summary(self) -> dict[str, Any]:
        """All but the outcomes, for JSON."""
        bars = {k: {"value": b.value, "rows": b.count} for k, b in self.categories.items()}
        return {
            "metric": self.metric,
            "value": self.value,
            "unit": self.unit,
            "figures": self.figures,
            "categories": bars,
            "notes": self.notes,
            **({} if self.guessing is None else {"guessing": self.guessing}),
            **({"compared": [guess.to_json() for guess in self.guesses]} if self.guesses else {}),
            **({"broken": self.broken} if self.broken else {}),
        }


def mean(values: Iterable[float]) -> float:
    """Mean; 0 of nothing."""
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def percent(outcomes: Iterable[Outcome]) -> float:
    """Mean credit of the scored outcomes, in percent."""
    return 100 * mean(o.credit for o in outcomes if o.credit is not None)


def bars(categories: Sequence[str], outcomes: Sequence[Outcome]) -> dict[str, Bar]:
    """Mean credit in percent by category, in the order in which categories first appear."""
    groups: dict[str, list[Outcome]] = {}
    for category, outcome in zip(categories, outcomes, strict=True):
        groups.setdefault(category, []).append(outcome)
    return {name: Bar(percent(group), len(group)) for name, group in groups.items()}
