"""What the pool's workers run for the weights of samples."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from dattn_mcore.training.optimizer import build_optimizer, wrap_ddp
from dattn_mcore.training.schedule import build_scheduler
from dattn_mcore.training.step import train_step
from tests.distributed.visual_jobs import _model, random_inputs


def _inputs(config: Any, layouts: Any, weights: list[float]) -> Any:
    """A micro-batch whose supervised rows have weights in turn."""
    inputs = random_inputs(config, layouts)
    count = int((inputs.labels != -100).sum())
    inputs.weights = torch.tensor((weights * count)[:count])
    return inputs


def oracle(
    tree: dict[str, Any], layouts: Any, weights: list[list[float]]
) -> tuple[float, dict[str, torch.Tensor]]:
    """The weighted mean by PyTorch's cross entropy and autograd, in float64 from the logits on."""
    config, _, model = _model(tree)
    total, of_weights = torch.zeros((), dtype=torch.float64), 0.0
    for own in weights:
        inputs = _inputs(config, layouts, own)
        rows = inputs.labels != -100
        logits = model(inputs, return_logits=True)[rows, : config.model.llm.vocab_size].double()
        losses = F.cross_entropy(logits, inputs.labels[rows], reduction="none")
        total = total + (losses * inputs.weights.double()).sum()
        of_weights += float(inputs.weights.double().sum())
    mean = total / of_weights
    mean.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return float(mean), found


def trained(
    tree: dict[str, Any], layouts: Any, weights: list[list[float]]
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss of a training step, and the gradients that the optimizer gets."""
    config, groups, model = _model(tree)
    wrapped = wrap_ddp([model], config, groups)
    optimizer = build_optimizer(config, wrapped)
    scheduler = build_scheduler(config, optimizer, 10)
    packs = [_inputs(config, layouts, own) for own in weights]
    found: dict[str, torch.Tensor] = {}

    def step() -> tuple[bool, float, None]:
        named = model.named_parameters()
        found.update((name, p.main_grad.clone()) for name, p in named if p.requires_grad)
        return True, 0.0, None

    with mock.patch.object(optimizer, "step", step):
        result = train_step(wrapped, optimizer, scheduler, packs, groups)
    assert result.loss is not None
    return result.loss, found
