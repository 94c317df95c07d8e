"""Gated activations in one autograd node, against the same written out."""

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from dattn_mcore.layers.activations import activation_function, gated_activation, mlp_settings

SIZES = dict(num_layers=1, hidden_size=8, num_attention_heads=1, add_bias_linear=False)


@pytest.mark.parametrize("name", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_plain_form(name, dtype):
    """Bit for bit: the operations on a number are the same."""
    function = activation_function(name)
    module = gated_activation(function)(TransformerConfig(**SIZES))
    torch.manual_seed(0)
    x = torch.randn(5, 1, 2 * 12, dtype=dtype)
    grad = torch.randn(5, 1, 12, dtype=dtype)
    found, plain = (x.clone().requires_grad_() for _ in range(2))
    y = module(found)
    y.backward(grad)
    gate, linear = plain.chunk(2, dim=-1)
    expected = function(gate) * linear
    expected.backward(grad)
    assert torch.equal(y, expected)
    assert torch.equal(found.grad, plain.grad)


def test_it_keeps_its_input_and_nothing_else():
    module = gated_activation(activation_function("silu"))(TransformerConfig(**SIZES))
    x = torch.randn(5, 24, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(x)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


def test_megatron_core_takes_the_settings_of_either_kind():
    for name in ("silu", "gelu_tanh"):
        TransformerConfig(**SIZES, **mlp_settings(name, gated=True))
        assert TransformerConfig(**SIZES, **mlp_settings(name, gated=False)).activation_func
