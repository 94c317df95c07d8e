"""Norms of the compiled module: what `transformer_engine_torch` computes, in PyTorch's float32."""

from __future__ import annotations

from typing import Any

import torch

from tests.te.casts import result_of


def _gamma(weight: torch.Tensor, zero_centered: bool) -> torch.Tensor:
    return weight.float() + 1 if zero_centered else weight.float()


def rmsnorm_fwd(
    input: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    ln_out: Any,
    quantizer: Any,
    otype: Any,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> list[Any]:
    """[rows, hidden] normalised, nothing, and the inverse root mean square of each row."""
    x = input.float()
    rsigma = torch.rsqrt(x.square().mean(-1) + eps)
    y = x * rsigma[:, None] * _gamma(weight, zero_centered_gamma)
    return [result_of(y, otype, quantizer, ln_out), None, rsigma]


def rmsnorm_bwd(
    dz: torch.Tensor,
    x: torch.Tensor,
    rsigma: torch.Tensor,
    gamma: torch.Tensor,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> list[torch.Tensor]:
    """Gradients of the rows and of the weight."""
    unit = x.float() * rsigma[:, None]
    scaled = dz.float() * _gamma(gamma, zero_centered_gamma)
    dx = (scaled - unit * (scaled * unit).mean(-1, keepdim=True)) * rsigma[:, None]
    return [dx.to(x.dtype), (dz.float() * unit).sum(0).to(gamma.dtype)]


def layernorm_fwd(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    ln_out: Any,
    quantizer: Any,
    otype: Any,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> list[Any]:
    """[rows, hidden] normalised, the mean and the inverse deviation of each row."""
    x = input.float()
    mean = x.mean(-1)
    rsigma = torch.rsqrt(x.var(-1, correction=0) + eps)
    y = (x - mean[:, None]) * rsigma[:, None] * _gamma(weight, zero_centered_gamma) + bias.float()
    return [result_of(y, otype, quantizer, ln_out), mean, rsigma]


def layernorm_bwd(
    dz: torch.Tensor,
    x: torch.Tensor,
    mu: torch.Tensor,
    rsigma: torch.Tensor,
    gamma: torch.Tensor,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> list[torch.Tensor]:
    """Gradients of the rows, the weight and the bias."""
    unit = (x.float() - mu[:, None]) * rsigma[:, None]
    scaled = dz.float() * _gamma(gamma, zero_centered_gamma)
    inner = scaled - scaled.mean(-1, keepdim=True)
    dx = (inner - unit * (scaled * unit).mean(-1, keepdim=True)) * rsigma[:, None]
    d_weight, d_bias = (dz.float() * unit).sum(0), dz.float().sum(0)
    return [dx.to(x.dtype), d_weight.to(gamma.dtype), d_bias.to(gamma.dtype)]
