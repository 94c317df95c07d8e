"""Which whole checkpoints of a run stay on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dattn_mcore.config.metric_names import smallest_is_best
from dattn_mcore.config.schema import CheckpointConfig


@dataclass(frozen=True)
class Retention:
    """The rules; a checkpoint stays that any of them keeps.

    Attributes:
        newest: so many of the newest stay.
        every: those of a step that it divides stay; None: no such rule.
        best: so many of the best stay.
        best_by: the metric that says which are best; None: no such rule.
        smallest: whether its smallest value is best.
    """

    newest: int
    every: int | None = None
    best: int = 0
    best_by: str | None = None
    smallest: bool = False

    @classmethod
    def of(cls, checkpoint: CheckpointConfig) -> Retention:
        """The rules that a configuration states."""
        by = checkpoint.best_by
        return cls(
            newest=checkpoint.keep,
            every=checkpoint.keep_every,
            best=checkpoint.keep_best,
            best_by=by,
            smallest=by is not None and smallest_is_best(by, checkpoint.best_mode),
        )

    def staying(self, metrics: Mapping[int, Mapping[str, float]]) -> set[int]:
        """The steps whose checkpoints stay.

        Args:
            metrics: what each whole checkpoint's manifest says, by step. Of equal values the newer
                checkpoint's is better; one without the metric is none of the best.
        """
        steps = sorted(metrics, reverse=True)
        stay = set(steps[: self.newest])
        if self.every is not None:
            stay |= {step for step in steps if step and step % self.every == 0}
        if self.best_by is not None:
            sign = 1 if self.smallest else -1
            values = {
                s: sign * metrics[s][self.best_by] for s in steps if self.best_by in metrics[s]
            }
            stay |= set(sorted(values, key=lambda step: values[step])[: self.best])
        return stay
