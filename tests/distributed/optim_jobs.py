"""A run whose weights plain PyTorch updates, by groups that a test writes out by hand."""

from __future__ import annotations

import re
from typing import Any
from unittest import mock

import torch

from tests.distributed.watched_jobs import weights_by_step

# Pattern of a module's names, and peak rate, weight decay and both betas; the first that is found.
Rules = list[tuple[str, tuple[float, float, float, float] | None]]


def weights_by_plain_adamw(
    tree: dict[str, Any], rules: Rules, rates: list[float]
) -> list[dict[str, torch.Tensor]]:
    """Weights before the first step and after each, of `torch.optim.AdamW` on the same gradients.

    Args:
        tree: the run's settings; its groups and rates are not looked at.
        rules: for each parameter the first whose pattern is found in its name; None: frozen.
        rates: of each step, relative to the peak.
    """
    from dattn_mcore.checkpoint.save import CheckpointSaver
    from dattn_mcore.training import loop
    from dattn_mcore.training.step import StepResult, run_schedule, sum_reports

    done: list[torch.optim.AdamW] = []

    def step(model, optimizer, scheduler, micro_batches, pg_collection, model_flops=0.0):
        named = dict(model[0].module.named_parameters())
        chosen = {
            name: next(settings for pattern, settings in rules if re.search(pattern, name))
            for name in named
        }
        learning = {name for name, settings in chosen.items() if settings is not None}
        assert {name for name, p in named.items() if p.requires_grad} == learning
        if not done:
            groups = [
                dict(params=[named[name]], lr=lr, weight_decay=decay, betas=(beta1, beta2), peak=lr)
                for name in named
                if (settings := chosen[name]) is not None
                for lr, decay, beta1, beta2 in [settings]
            ]
            done.append(torch.optim.AdamW(groups, eps=tree["optim"]["eps"]))
        (adam,) = done
        model[0].zero_grad_buffer()
        reports = run_schedule(model, micro_batches, pg_collection, forward_only=False)
        sums, _ = sum_reports(reports, micro_batches[0], model_flops)
        gradients = {name: named[name].main_grad for name in sorted(learning)}
        norm = torch.stack([g.double().norm() for g in gradients.values()]).norm()
        for name, gradient in gradients.items():
            named[name].grad = gradient * min(1.0, 1.0 / (float(norm) + 1e-6))
        count = int(next(iter(adam.state.values()))["step"]) if adam.state else 0
        for group in adam.param_groups:
            group["lr"] = group["peak"] * rates[count]
        adam.step()
        for parameter in named.values():
            parameter.grad = None
        loss = float(sums[0, 0] / sums[0, 1])
        return StepResult(loss, float(norm), int(sums[0, 1]), 0.0, {1.0: 1.0})

    with (
        mock.patch.object(loop, "train_step", step),
        mock.patch.object(CheckpointSaver, "save", lambda saver, step, **kwargs: None),
    ):
        return weights_by_step(tree)
