"""RMSNorm and LayerNorm that know sequence parallelism and zero-centred gammas.

Megatron-Core's `WrappedTorchNorm` refuses both; Transformer Engine's norm needs a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn


class _RmsNorm(torch.autograd.Function):
    """Root-mean-square norm in few passes, for devices where PyTorch has no fused one."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        normed, wide = x.float() * scale, grad.float()
        found_x = found_weight = None
        if ctx.needs_input_grad[1]:
            found_weight = (wide * normed).reshape(-1, x.shape[-1]).sum(0)
        if ctx.needs_input_grad[0]:
            wide = wide * weight
            mean = torch.linalg.vecdot(wide, normed)[..., None] / x.shape[-1]
            found_x = wide.addcmul_(normed, mean, value=-1).mul_(scale).to(x.dtype)
        return found_x, found_weight, None


class Norm(nn.Module):
    """Normalises the last dimension in float32 and scales it; the result has the input's dtype.

    Args:
        config: `normalization` is RMSNorm or LayerNorm; `layernorm_zero_centered_gamma` scales
            by 1 + weight, with weights that start at 0; with `sequence_parallel` the
            gradients are summed over the tensor parallel group by Megatron-Core.
        hidden_size: size of the last dimension.
        eps: added to the variance.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.hidden_size, self.eps = hidden_size, eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        start = torch.zeros if self.zero_centered else torch.ones
        self.weight = nn.Parameter(start(hidden_size, dtype=config.params_dtype))
        self.bias = None
        if config.normalization == "LayerNorm":
            self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Takes [..., hidden_size]; returns the same shape and dtype."""
        weight = self.weight.float()
        if self.zero_centered:
            weight = 1.0 + weight
        if self.bias is None and x.device.type == "cpu":
            return _RmsNorm.apply(x, weight, self.eps)
        if self.bias is None:
            return F.rms_norm(x.float(), (self.hidden_size,), weight, self.eps).to(x.dtype)
        bias = self.bias.float()
        return F.layer_norm(x.float(), (self.hidden_size,), weight, bias, self.eps).to(x.dtype)
