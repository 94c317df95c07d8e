"""Runs of the pool's workers whose weights are watched, or made NaN."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from tests.distributed.jobs import run_training


def weights_by_step(tree: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    """Trains; returns this rank's weights before the first step and after each."""
    from dattn_mcore.training import loop

    original = loop.train_step
    seen: list[dict[str, torch.Tensor]] = []

    def noted(model: Any, *args: Any) -> Any:
        def weights() -> dict[str, torch.Tensor]:
            return {k: p.detach().clone() for k, p in model[0].module.named_parameters()}

        if not seen:
            seen.append(weights())
        result = original(model, *args)
        seen.append(weights())
        return result

    loop.train_step = noted
    try:
        run_training(tree)
    finally:
        loop.train_step = original
    return seen


def train_with_poison(tree: dict[str, Any], poison: str) -> tuple[str, bool]:
    """Trains; in step 2 the last rank's weights or gradients turn to NaN.

    Returns:
        What the run raised, and whether the other weights are those from before the step.
    """
    from dattn_mcore.errors import DattnError
    from dattn_mcore.training import loop

    original, seen = loop.train_step, {"calls": 0}
    last = dist.get_rank() == dist.get_world_size() - 1

    def poisoned(model, *args):
        seen["calls"] += 1
        if seen["calls"] == 2:
            weights = dict(model[0].module.named_parameters())
            name = "decoder.final_layernorm.weight"
            victim = weights.pop(name)
            seen["model"] = weights
            seen["before"] = {k: p.detach().clone() for k, p in weights.items()}
            if last and poison == "weight":
                victim.data[0] = torch.nan
            elif last:
                next(iter(weights.values())).register_hook(lambda grad: grad * torch.nan)
        return original(model, *args)

    loop.train_step = poisoned
    try:
        run_training(tree)
    except DattnError as error:
        before: Any = seen["before"]
        now: Any = seen["model"]
        return str(error), all(torch.equal(before[k], now[k]) for k in before)
    finally:
        loop.train_step = original
    return "", False
