"""The arithmetic that stands in for Transformer Engine's kernels, against PyTorch's own."""

import types

import pytest
import torch
import torch.nn.functional as F

from tests.te import casts, multi_tensor, norms, products
from tests.te.casts import DType


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_and_their_gradients(kind, zero_centered):
    torch.manual_seed(1)
    x, weight, bias, dy = torch.randn(7, 24), torch.randn(24), torch.randn(24), torch.randn(7, 24)
    for tensor in (x, weight, bias):
        tensor.requires_grad_()
    gamma = weight + 1 if zero_centered else weight
    rest = (None, None, DType.kFloat32, 0, zero_centered)
    if kind == "rms":
        want = F.rms_norm(x, (24,), gamma, 1e-5)
        y, _, rsigma = norms.rmsnorm_fwd(x.detach(), weight.detach(), 1e-5, *rest)
        arguments = (dy, x.detach(), rsigma, weight.detach(), 0, zero_centered)
        gradients = norms.rmsnorm_bwd(*arguments)
    else:
        want = F.layer_norm(x, (24,), gamma, bias, 1e-5)
        y, mean, rsigma = norms.layernorm_fwd(
            x.detach(), weight.detach(), bias.detach(), 1e-5, *rest
        )
        arguments = (dy, x.detach(), mean, rsigma, weight.detach(), 0, zero_centered)
        gradients = norms.layernorm_bwd(*arguments)
    want.backward(dy)
    torch.testing.assert_close(y, want.detach())
    wanted = [x.grad, weight.grad, bias.grad][: len(gradients)]
    for found, expected in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_adam_is_adamw():
    torch.manual_seed(1)
    mine = torch.nn.Parameter(torch.randn(5, 3))
    theirs = torch.nn.Parameter(mine.detach().clone())
    mean, square = torch.zeros_like(mine), torch.zeros_like(mine)
    adam = torch.optim.AdamW([theirs], lr=0.1, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.2)
    for step in (1, 2, 3):
        theirs.grad = torch.randn(5, 3)
        lists = [[theirs.grad], [mine], [mean], [square]]
        multi_tensor.multi_tensor_adam(
            1024, torch.zeros(1), lists, 0.1, 0.9, 0.95, 1e-6, step, 1, 1, 0.2
        )
        adam.step()
    torch.testing.assert_close(mine, theirs)


def test_norm_and_scale_over_lists():
    tensors = [torch.tensor([3.0]), torch.tensor([[4.0]])]
    total, each = multi_tensor.multi_tensor_l2norm(1, torch.zeros(1), [tensors], True)
    assert total.tolist() == [5] and each.tolist() == [3, 4]
    flag = torch.zeros(1, dtype=torch.int)
    scaled = [torch.empty(1), torch.empty(1, 1)]
    multi_tensor.multi_tensor_scale(1, flag, [tensors, scaled], 0.5)
    assert [t.item() for t in scaled] == [1.5, 2] and flag.item() == 0
    multi_tensor.multi_tensor_scale(1, flag, [[torch.tensor([torch.inf])], [torch.empty(1)]], 1.0)
    assert flag.item() == 1


@pytest.mark.parametrize("layout", ["TN", "NN", "NT"])
def test_products_of_each_layout(layout):
    torch.manual_seed(1)
    shapes = {"TN": ((6, 5), (4, 5)), "NN": ((6, 5), (4, 6)), "NT": ((4, 5), (4, 6))}
    a, b = (torch.randn(shape) for shape in shapes[layout])
    want = {"TN": lambda: b @ a.t(), "NN": lambda: b @ a, "NT": lambda: b.t() @ a}[layout]()

    def multiply(out=None, bias=None, grad=False, accumulate=False):
        operands = [a, layout[0] == "T", b, layout[1] == "T", out]
        settings = [None, None, bias, DType.kFloat32, False, None, grad, torch.empty(0), 0]
        return products.generic_gemm(*operands, *settings, accumulate, False)

    torch.testing.assert_close(multiply()[0], want)
    bias = torch.randn(want.shape[1])
    torch.testing.assert_close(multiply(bias=bias)[0], want + bias)
    torch.testing.assert_close(multiply(bias=bias, grad=True)[1], b.sum(0))
    out = torch.ones_like(want)
    assert multiply(out=out, accumulate=True)[0] is out
    torch.testing.assert_close(out, want + 1)


@pytest.mark.parametrize("dimension", [1, 2])
def test_blocks_have_scales_of_their_own(dimension):
    """e4m3 has three bits: an error of 1/16 of the largest number of the block at most."""
    torch.manual_seed(1)
    x = torch.randn(200, 300) * torch.logspace(-3, 3, 300)
    quantizer = types.SimpleNamespace(
        dtype=DType.kFloat8E4M3,
        block_scaling_dim=dimension,
        amax_epsilon=0.0,
        force_pow_2_scales=True,
    )
    data, scale_inv = casts.quantize_blocks(x, quantizer)
    assert scale_inv.shape == (200 if dimension == 1 else 2, 3)
    assert torch.equal(torch.log2(scale_inv).round(), torch.log2(scale_inv))
    wide = scale_inv.repeat_interleave(128 if dimension == 2 else 1, 0)[:200]
    wide = wide.repeat_interleave(128, 1)[:, :300]
    back = data.view(torch.float8_e4m3fn).float() * wide
    assert bool(((back - x).abs() <= x.abs() / 16 + wide * 2**-9).all())


def test_what_has_no_stand_in_says_its_name():
    from tests.te.compiled_module import compiled_module

    with pytest.raises(NotImplementedError, match="transformer_engine_torch.moe_permute_fwd has"):
        compiled_module().moe_permute_fwd()
