"""Which optimizer settings a resumed run takes: those given now, or those of its checkpoint."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from dattn_mcore.config.load import from_dict, to_dict
from dattn_mcore.config.schema import Config
from dattn_mcore.errors import ConfigError

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
        ConfigError: the kept schedule would train further steps at rate 0.
    """
    there = from_dict({"optim": manifest["config"].get("optim", {})}).optim
    ours, theirs = to_dict(config)["optim"], to_dict(replace(config, optim=there))["optim"]
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
        logger.info(
            "optimizer settings differ from those of step %d and hold from here: %s (%s=true keeps "
            "the others)",
            done,
            what,
            _KEEP,
        )
        return config, steps
    if steps > steps_there and there.min_lr_ratio == 0:
        raise ConfigError(
            f"{_KEEP}=true: the checkpoint's schedule ends at step {steps_there} with a learning "
            f"rate of 0, and this run has {steps}; set it to false, or train.steps={steps_there}"
        )
    logger.info("optimizer settings of step %d are kept (%s=true), not: %s", done, _KEEP, what)
    return replace(config, optim=there), steps_there
