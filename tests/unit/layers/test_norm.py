"""The norm of the local layers, against its formula in float64."""

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from dattn_mcore.layers.norm import Norm


def norm_of(size, **settings):
    config = TransformerConfig(
        num_layers=1, hidden_size=size, num_attention_heads=1, normalization="RMSNorm", **settings
    )
    return Norm(config, size, eps=1e-5)


@pytest.mark.parametrize("zero_centred", [False, True])
@pytest.mark.parametrize("shape", [(7, 1, 48), (3, 4, 48), (48,)])
def test_values_and_gradients(shape, zero_centred):
    torch.manual_seed(0)
    norm = norm_of(48, layernorm_zero_centered_gamma=zero_centred)
    norm.weight.data += torch.randn(48) / 4
    x, grad = torch.randn(shape) * 3, torch.randn(shape)
    found = x.clone().requires_grad_()
    y = norm(found)
    y.backward(grad)

    wide, weight = (t.detach().double().requires_grad_() for t in (x, norm.weight))
    factor = 1 + weight if zero_centred else weight
    expected = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * factor
    expected.backward(grad.double())
    for one, other in (
        (y, expected),
        (found.grad, wide.grad),
        (norm.weight.grad, weight.grad),
    ):
        torch.testing.assert_close(one.double(), other, rtol=2e-6, atol=2e-6)


def test_bf16_is_rounded_once():
    torch.manual_seed(0)
    norm = norm_of(48, params_dtype=torch.bfloat16)
    x = torch.randn(5, 1, 48, dtype=torch.bfloat16)
    wide = x.double()
    expected = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(norm(x), expected.to(torch.bfloat16))


def test_a_frozen_weight_gets_no_gradient_and_rows_of_zeros_are_finite():
    norm = norm_of(8)
    norm.weight.requires_grad_(False)
    x = torch.zeros(3, 1, 8, requires_grad=True)
    norm(x).sum().backward()
    assert norm.weight.grad is None and torch.isfinite(x.grad).all()
