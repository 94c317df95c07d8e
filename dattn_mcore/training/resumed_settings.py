"""Which optimizer settings a resumed run takes: those given now, or those of its checkpoint."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from dattn_mcore.config.load import from_dict, to_dict
from dattn_mcore.config.schedule import WARMUP_RATIO, peak_ratio, schedule_of
from dattn_mcore.config.schema import Config, OptimConfig
from dattn_mcore.errors import ConfigError
from dattn_mcore.training.schedule import rate_of

logger = logging.getLogger(__name__)
_KEEP = "checkpoint.keep_optimizer_settings"


def take_settings(
    config: Config, manifest: dict[str, Any], steps: int, steps_there: int
) -> tuple[Config, int]:
    """Says in one line what differs from the checkpoint, and which of the two holds.

    Args:
        config: as it was given.
        manifest: of the checkpoint that the run goes on from.
        steps: of the whole run, as it was given.
        steps_there: that the learning rate's schedule takes in the checkpoint.

    Returns:
        The configuration to train with, and the steps of its schedule.

    Raises:
        ConfigError: the kept schedule would train further steps at rate 0, or a schedule that was
            decaying would rise again.
    """
    saved = from_dict({name: manifest["config"].get(name, {}) for name in ("optim", "train")})
    there = saved.optim
    ours, theirs = (_shown(optim) for optim in (config.optim, there))
    changed = [
        f"optim.{name} {theirs[name]} -> {value}"
        for name, value in ours.items()
        if value != theirs[name]
    ]
    if steps != steps_there:
        changed.append(f"steps of the learning rate's schedule {steps_there} -> {steps}")
    if not changed:
        return config, steps
    what, done = ", ".join(changed), manifest["step"]
    if not config.checkpoint.keep_optimizer_settings:
        _refuse_to_rise_again(config.optim, steps, there, steps_there, done)
        logger.info(
            "optimizer settings differ from those of step %d and hold from here: %s (%s=true keeps "
            "the others)",
            done,
            what,
            _KEEP,
        )
        return config, steps
    end = schedule_of(there, steps_there).end - 1
    if steps > end and peak_ratio(there) == 0:
        raise ConfigError(
            f"{_KEEP}=true: the checkpoint's schedule ends at step {end} with a learning "
            f"rate of 0, and this run has {steps}; set it to false, or train.steps={end}"
        )
    logger.info("optimizer settings of step %d are kept (%s=true), not: %s", done, _KEEP, what)
    # With its groups the parts that they add to; both together train the same parameters.
    train = replace(config.train, trains=saved.train.trains)
    return replace(config, optim=there, train=train), steps_there


def _shown(optim: OptimConfig) -> dict[str, Any]:
    """Settings as plain values; a warm-up that is not set as the ratio that it has."""
    if optim.warmup_ratio is None and optim.warmup_steps is None:
        optim = replace(optim, warmup_ratio=WARMUP_RATIO)
    return to_dict(Config(optim=optim))["optim"]


def _refuse_to_rise_again(
    ours: OptimConfig, steps: int, theirs: OptimConfig, steps_there: int, done: int
) -> None:
    """Refuses a WSD schedule that moves its decay after the checkpoint's has begun.

    Raises:
        ConfigError: with the last step from which it could go on.
    """
    if not ours.schedule == theirs.schedule == "wsd" or not theirs.decay_steps:
        return
    here, there = schedule_of(ours, steps), schedule_of(theirs, steps_there)
    if done < there.falls_from:
        return
    # The peak may be another one now, but not what remains of it: steps, minimum, curve may differ.
    before, after = rate_of(theirs, steps_there, done), rate_of(ours, steps, done + 1)
    rises = after > before and after / ours.lr > before / theirs.lr * (1 + 1e-6)
    if rises or here.falls_from != there.falls_from:
        raise ConfigError(
            f"the checkpoint of step {done} stands in the last decay of its schedule, which began "
            f"at step {there.falls_from}, and optim.decay_steps={ours.decay_steps} with {steps} "
            "steps would raise the learning rate again; keep the run's length, optim.min_lr, "
            f"optim.wsd_decay={theirs.wsd_decay} and optim.decay_steps={theirs.decay_steps}, or "
            "remove the checkpoints after step "
            f"{there.falls_from - 1}"
        )
