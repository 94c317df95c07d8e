"""Runs of the pool's workers that are stopped by a signal, and those that go on from there."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from dattn_mcore.config.schema import Config
from tests.distributed.jobs import run_training


def train_until_killed(tree: dict[str, Any], step: int) -> bool:
    """Trains, and sends this process a stopping signal when a step begins."""
    import os
    import signal

    from dattn_mcore.training import loop

    original = loop.train_step

    def counted(*args: Any, **kwargs: Any) -> Any:
        counted.calls += 1
        if counted.calls == step and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    counted.calls = 0
    loop.train_step = counted
    try:
        return run_training(tree)
    finally:
        loop.train_step = original


def train_with_a_dead_first_step(tree: dict[str, Any], step: int) -> bool:
    """Like `train_until_killed`, with an older schedule, whose step 1 had rate 0."""
    from unittest import mock

    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    from dattn_mcore.training import setup

    def build(config: Config, optimizer: Any, total_steps: int) -> OptimizerParamScheduler:
        optim = config.optim
        return OptimizerParamScheduler(
            optimizer,
            init_lr=0.0,
            max_lr=optim.lr,
            min_lr=optim.lr * optim.min_lr_ratio,
            lr_warmup_steps=min(round(optim.warmup_ratio * total_steps), total_steps - 1),
            lr_decay_steps=total_steps,
            lr_decay_style="cosine",
            start_wd=optim.weight_decay,
            end_wd=optim.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
        )

    with mock.patch.object(setup, "build_scheduler", build):
        return train_until_killed(tree, step)


def saves_until_killed(tree: dict[str, Any], step: int) -> list[int]:
    """Like `train_until_killed`; returns the steps that were saved."""
    from dattn_mcore.checkpoint.save import CheckpointSaver

    original = CheckpointSaver.save
    saved: list[int] = []

    def noted(saver: CheckpointSaver, at: int, **kwargs: Any) -> Any:
        saved.append(at)
        return original(saver, at, **kwargs)

    CheckpointSaver.save = noted
    try:
        train_until_killed(tree, step)
    finally:
        CheckpointSaver.save = original
    return saved


def adam_steps_after_resume(tree: dict[str, Any]) -> list[float]:
    """Resumes, does one step, and returns Adam's step count of every parameter."""
    from dattn_mcore.training import loop

    seen: list[float] = []
    original = loop.train_step

    def one_step(model, optimizer, *args):
        result = original(model, optimizer, *args)
        inner = optimizer.chained_optimizers[0].optimizer
        if not seen:
            seen.extend(float(state["step"]) for state in inner.state.values())
        return result

    loop.train_step = one_step
    try:
        run_training(tree)
    finally:
        loop.train_step = original
    return seen
