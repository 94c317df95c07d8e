"""Megatron-Core's schedule of learning rates, from the run's configuration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from dattn_mcore.config.schedule import peak_ratio, schedule_of
from dattn_mcore.config.schema import Config, OptimConfig

_STYLES = {"inverse_square_root": "inverse-square-root", "wsd": "WSD"}  # Megatron-Core's words


def build_scheduler(config: Config, optimizer: Any, total_steps: int) -> OptimizerParamScheduler:
    """The curve of `optim.schedule` after a linear warm-up, counted in optimizer steps.

    Of N steps with a warm-up of w, step i (from 1) has the rate peak x i / w up to step w, and the
    minimum is reached after the last step, where step N + 1 would be. So no step has rate 0: a
    step of rate 0 learns nothing. Without a warm-up the first step has the peak.

    Args:
        config: of the run.
        optimizer: Megatron-Core's, whose groups get the rates; may have rates of their own.
        total_steps: of the run.

    Returns:
        Megatron-Core's scheduler, with the rates of the first step set; `step(1)` after each step.

    Raises:
        ConfigError: warm-up and decay do not fit into the run.
    """
    optim = config.optim
    schedule = schedule_of(optim, total_steps)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.lr * peak_ratio(optim),
        lr_warmup_steps=schedule.warmup,
        lr_decay_steps=schedule.end,
        lr_decay_style=_STYLES.get(optim.schedule, optim.schedule),
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        wsd_decay_steps=schedule.final_decay,
        lr_wsd_decay_style=optim.wsd_decay,
    )
    scheduler.step(1)  # Megatron-Core counts steps that are done; its rate of 0 steps is 0
    return scheduler


def rate_of(optim: OptimConfig, total_steps: int, step: int) -> float:
    """The learning rate of a step, counted from 1, of parameters without one of their own."""
    group: dict[str, Any] = {}
    optimizer = SimpleNamespace(param_groups=[group])
    scheduler = build_scheduler(Config(optim=optim), optimizer, total_steps)
    scheduler.step(step - 1)
    return float(group["lr"])
