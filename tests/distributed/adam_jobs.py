"""Runs of the pool's workers with a stand-in for Transformer Engine's Adam."""

from __future__ import annotations

from typing import Any

import torch

from tests.distributed.interrupted_jobs import train_until_killed
from tests.distributed.jobs import run_training


class FusedAdam(torch.optim.Optimizer):
    """Transformer Engine's, as far as a checkpoint sees it: its groups, its count of steps.

    Source: TransformerEngine, `pytorch/optimizers/fused_adam.py`.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: Any,
        eps: float,
        weight_decay: float,
        capturable: bool = False,  # passed from megatron-core 0.19 on
    ):
        names = dict(lr=lr, bias_correction=True, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, names)

    @torch.no_grad()
    def step(self) -> None:
        """AdamW with the step in the group."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            assert isinstance(group["step"], int) and group["bias_correction"]
            (beta1, beta2), step = group["betas"], group["step"]
            for p in group["params"]:
                state = self.state[p]
                mean = state.setdefault("exp_avg", torch.zeros_like(p))
                square = state.setdefault("exp_avg_sq", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - beta1)
                square.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                root = (square / (1 - beta2**step)).sqrt_().add_(group["eps"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.addcdiv_(mean, root, value=-group["lr"] / (1 - beta1**step))


def train_with_fused_adam(tree: dict[str, Any], until: int | None = None) -> bool:
    """A run where Megatron-Core finds Transformer Engine's Adam; killed in step `until`."""
    from unittest import mock

    from megatron.core.optimizer import distrib_optimizer

    with (
        mock.patch.object(torch.optim, "AdamW", FusedAdam),
        mock.patch.object(distrib_optimizer, "HAVE_APEX_OR_TE", True),
        mock.patch.object(distrib_optimizer, "USING_TE_OPTIMIZER", True),
    ):
        return run_training(tree) if until is None else train_until_killed(tree, until)
