"""Rules for which checkpoints stay, and for the mean of the weights; one line per breach."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from dattn_mcore.config.metric_names import is_computed, known_metrics
from dattn_mcore.config.schema import Config

_SHOWN = 100  # characters of what was typed


def kept(config: Config) -> Iterator[str]:
    """Steps that are saved, and a metric that is computed."""
    checkpoint = config.checkpoint
    every, interval = checkpoint.keep_every, checkpoint.save_interval
    if every is not None and every % interval:
        yield (
            f"checkpoint.keep_every={every} must be a multiple of checkpoint.save_interval="
            f"{interval}: no other step is saved"
        )
    by = checkpoint.best_by
    if by is None:
        if checkpoint.keep_best > 0:
            yield (
                f"checkpoint.keep_best={checkpoint.keep_best} needs checkpoint.best_by, the metric "
                f"that says which are best; {_computed(config)}"
            )
        return
    name = f"checkpoint.best_by={by[:_SHOWN]!r}"
    if not is_computed(by, config):
        near = difflib.get_close_matches(by[:_SHOWN], known_metrics(config), n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        yield f"{name} is a metric that nothing in this run computes; {_computed(config)}{meant}"
    if checkpoint.keep_best == 0:
        yield f"{name} needs checkpoint.keep_best of at least 1; or set it to null"


def mean_of_weights(config: Config) -> Iterator[str]:
    """The running mean of the weights."""
    decay, start = config.train.ema_decay, config.train.ema_start
    if decay is None:
        if start > 0:
            yield f"train.ema_start={start} needs train.ema_decay, for example 0.999"
    elif decay < 0 or decay >= 1:
        yield f"train.ema_decay={decay} must be at least 0 and less than 1, or null for none"


def _computed(config: Config) -> str:
    known = known_metrics(config)
    if not known:
        return "this run computes none: ask for validation or scores"
    return f"this run computes {', '.join(known)}"
