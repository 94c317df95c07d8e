"""Names of the metrics that a run computes beside its training loss, and which value is best.

A name is a path: who computes it, then what it is, as `validation/loss` or `scores/vqav2`.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import Literal

from dattn_mcore.config.schema import Config
from dattn_mcore.config.validation_rules import validates

BestMode = Literal["auto", "min", "max"]


def known_metrics(config: Config) -> tuple[str, ...]:
    """The metrics that this run will compute: names, or patterns such as `validation/loss/*`."""
    known = ["validation/loss"] if validates(config) else []
    known += [f"scores/{name}" for name in config.scores.benchmarks]
    if config.scores.questions is not None:
        known.append("scores/questions")
    return tuple(known)


def is_computed(name: str, config: Config) -> bool:
    """Whether a run computes a metric of this name."""
    return any(fnmatchcase(name, pattern) for pattern in known_metrics(config))


def smallest_is_best(name: str, mode: BestMode) -> bool:
    """Whether the smallest value of a metric is the best one.

    Args:
        name: of the metric.
        mode: what the user said; `auto`: a name with the word loss in it is a loss.
    """
    if mode == "auto":
        return "loss" in re.split(r"[^a-z0-9]+", name.lower())
    return mode == "min"
