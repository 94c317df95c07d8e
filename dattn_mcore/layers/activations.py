"""Activations of MLPs, and those of gated ones in one autograd node that keeps its input alone.

Megatron-Core's own unfused form of a gated one keeps five tensors of the MLP's width for backward;
its fused forms are compiled, which needs a compiler on the machine, and know no tanh-approximated
GELU.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from dattn_mcore.architectures.activations import ACTIVATIONS
from dattn_mcore.architectures.sizes import TowerActivation


def activation_function(name: TowerActivation) -> Callable[[torch.Tensor], torch.Tensor]:
    """What computes an activation of `architectures.activations`."""
    activation = ACTIVATIONS[name]
    module, _, attribute = activation.function.partition(":")
    function: Callable[..., torch.Tensor] = getattr(importlib.import_module(module), attribute)
    if not activation.arguments:
        return function
    return functools.partial(function, **activation.arguments)


def mlp_settings(activation: TowerActivation, *, gated: bool) -> dict[str, Any]:
    """Of a `TransformerConfig`, for an MLP of `layers.spec.mlp_spec`."""
    if not gated:
        return dict(gated_linear_unit=False, activation_func=activation_function(activation))
    # With this setting the MLP takes the module of its spec, whoever wrote it. The function is not
    # called then; Megatron-Core accepts those that Transformer Engine has modules for.
    return dict(gated_linear_unit=True, use_te_activation_func=True, activation_func=F.silu)


class _Gated(torch.autograd.Function):
    """`activation(x[..., :n]) * x[..., n:]`; backward computes the activation again."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, activation: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.activation = activation
        gate, linear = x.chunk(2, dim=-1)
        return activation(gate).mul_(linear)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x,) = ctx.saved_tensors
        gate, linear = x.chunk(2, dim=-1)
        found = torch.empty_like(x)
        found_gate, found_linear = found.chunk(2, dim=-1)
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            activated = ctx.activation(leaf)
        torch.mul(grad, activated.detach(), out=found_linear)
        (gate_grad,) = torch.autograd.grad(activated, leaf, grad * linear)
        found_gate.copy_(gate_grad)
        return found, None


def gated_activation(activation: Callable[[torch.Tensor], torch.Tensor]) -> type[MegatronModule]:
    """The class of an activation module, which Megatron-Core's MLP builds from its configuration.

    The module gets the whole output of the first linear, [..., 2 * width], gate before linear half,
    and returns [..., width].

    Args:
        activation: of the gate, elementwise.
    """

    class GatedActivation(MegatronModule):
        def __init__(self, config: TransformerConfig) -> None:
            super().__init__(config)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return _Gated.apply(x, activation)

    return GatedActivation
