"""Samples that share images: rows of a pack, and attention as if each sample had its own.

Attention of every backend over the shared rows, forward and all gradients, against the float64
oracle of `test_attention` over a pack in which each sample has a copy of its images; autograd sums
what the copies get.
"""

import sys

import pytest
import torch

from dattn_mcore.layers.attention import AttentionInputs, AttentionOptions, Rotary, flash
from dattn_mcore.layers.attention.rotary import rotary_angles
from dattn_mcore.layers.attention.triton_backend import TritonBackend
from dattn_mcore.layers.attention.triton_tuning import Blocks, Tuning
from dattn_mcore.layers.blocks import Block
from dattn_mcore.layers.layout import build_seq_params, padded_rows
from dattn_mcore.types import NO_IMAGES, visual_units
from tests.unit.layers import flash_stand_in
from tests.unit.layers.test_attention import BACKENDS, make_inputs, oracle

# Two images of 6 and 3 rows, in one unit and, the first of them alone, in another.
LAYOUTS = (
    ((False, 2), (True, 6), (False, 3), (True, 3), (False, 4)),  # text before and between
    ((False, 5),),
    ((True, 6), (False, 4)),
    ((True, 9), (False, 1)),
    ((False, 1), (True, 6), (False, 7)),
    ((False, 3), (True, 9), (False, 2)),
    ((True, 6),),  # nothing asks
)
UNITS = (0, NO_IMAGES, 1, 0, 1, 0, 1)
MULTIPLE = 4
DIM = 16  # the smallest of the Triton kernel


def shared():
    return build_seq_params(LAYOUTS, t2v_position="none", multiple=MULTIPLE, images_of=UNITS)


def test_visual_rows_stand_once():
    params = shared()
    assert params.visual_lengths == (9, 6) and params.num_visual == 16
    assert params.text_lengths == (9, 5, 4, 1, 8, 5, 0)
    assert params.blocks == (
        Block(2, 5, 0, 6),
        Block(5, 9, 0, 9),
        Block(14, 18, 9, 15),
        Block(18, 19, 0, 9),
        Block(20, 27, 9, 15),
        Block(30, 32, 0, 9),
    )
    assert params.visual_positions.tolist() == [*range(9), *range(6), 0]
    assert params.text_positions[:14].tolist() == [*range(9), *range(5)]
    assert padded_rows(LAYOUTS, MULTIPLE, UNITS) == (16, 32)
    assert padded_rows(LAYOUTS, MULTIPLE) == (48, 32)


def test_units_of_one_sample_each_are_as_without():
    alone = build_seq_params(LAYOUTS[:3], t2v_position="none", images_of=(0, NO_IMAGES, 1))
    plain = build_seq_params(LAYOUTS[:3], t2v_position="none")
    assert (alone.blocks, alone.num_visual) == (plain.blocks, plain.num_visual)
    assert torch.equal(alone.visual_positions, plain.visual_positions)


@pytest.mark.parametrize(
    ("units", "words"),
    [
        ((0, NO_IMAGES, 0), "unit 0 has 9 visual rows, and 6"),
        ((1, NO_IMAGES, 0), "cannot be of unit 1"),
        ((0, 0, 1), "0 visual rows cannot be of unit 0"),
        ((0, NO_IMAGES, NO_IMAGES), "6 visual rows cannot be of unit -1"),
    ],
)
def test_units_that_do_not_fit(units, words):
    with pytest.raises(ValueError, match=words):
        visual_units(LAYOUTS[:3], units)


def test_rows_with_a_place_in_a_sample_are_not_shared():
    with pytest.raises(ValueError, match="cannot be shared"):
        build_seq_params(LAYOUTS, t2v_position="rope", images_of=UNITS)


def attended(backend, inputs, params, options):
    inv_freq = 100.0 ** -(torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
    of_pack = AttentionInputs(
        q=inputs[0],
        k_text=inputs[1],
        v_text=inputs[2],
        k_visual=inputs[3],
        v_visual=inputs[4],
        q_visual=None,
        rotary=Rotary(
            text=rotary_angles(params.text_positions, inv_freq),
            visual=rotary_angles(params.visual_positions, inv_freq),
        ),
        params=params,
    )
    return backend.attend(of_pack, options)[0]


def rows_of_copies(params, apart):
    """Of each row of the samples' own copies the shared row; that of padding has none."""
    starts = {0: 0, 1: 9}
    rows = [
        starts[unit] + row
        for layout, unit in zip(LAYOUTS, UNITS, strict=True)
        for row in range(sum(n for is_visual, n in layout if is_visual))
    ]
    return torch.tensor([*rows, *[params.num_visual - 1] * (apart.num_visual - len(rows))])


def compare(backend, options, dtype, tolerance, monkeypatch):
    monkeypatch.setattr("tests.unit.layers.test_attention.DIM", DIM)
    params, apart = shared(), build_seq_params(LAYOUTS, t2v_position="none", multiple=MULTIPLE)
    exact = make_inputs(params, dim=DIM)
    own = rows_of_copies(params, apart)
    copies = [*exact[:3], *(rows[own] for rows in exact[3:])]
    want, _ = oracle(copies, LAYOUTS, apart, options)
    inputs = [x.detach().to(dtype).requires_grad_() for x in exact[:5]]
    out = attended(backend, inputs, params, options)
    real = sum(params.text_lengths)
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).double()
    weight[real:] = 0
    torch.testing.assert_close(out[:real].double(), want[:real], atol=tolerance, rtol=tolerance)
    expected = torch.autograd.grad((want * weight).sum(), exact[:5])
    actual = torch.autograd.grad((out * weight.to(dtype)).sum(), inputs)
    for grad, like in zip(actual, expected, strict=True):
        assert like.abs().max() > 0.1
        bound = tolerance * like.abs().max().clamp(min=1)
        torch.testing.assert_close(grad.double(), like, atol=float(bound), rtol=0)


OPTIONS = {
    "alpha": AttentionOptions(scale=0.2),
    "sum": AttentionOptions(scale=0.2, merge="sum"),
    "window": AttentionOptions(scale=0.2, window=3),
    "softcap": AttentionOptions(scale=0.2, softcap=0.8),
}


# float64 with room for sums, as in `test_attention`.
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_equals_an_image_of_its_own(backend, name, monkeypatch):
    if backend == "sdpa" and name == "softcap":
        assert BACKENDS[backend].refuses(OPTIONS[name], "cpu", torch.float64, DIM)
        return
    compare(BACKENDS[backend], OPTIONS[name], torch.float64, 1e-11, monkeypatch)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("name", OPTIONS)
def test_flash_attn_equals_an_image_of_its_own(name, version, monkeypatch):
    """Its log-sum-exp is float32, and about 2 here: weights are off by 1e-7."""
    module = {2: flash_stand_in.flash_attn_2, 3: flash_stand_in.flash_attn_3}[version]()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(flash, "flash_version", lambda head_dim: version)
    compare(BACKENDS["flash"], OPTIONS[name], torch.float64, 1e-6, monkeypatch)


@pytest.mark.parametrize("name", OPTIONS)
def test_triton_equals_an_image_of_its_own(name, monkeypatch):
    """In float32; bounds are relative to the largest value of each gradient."""
    triton = pytest.importorskip("triton", reason="needs triton (pip install triton)")
    if not triton.knobs.runtime.interpret:
        pytest.skip("kernels are compiled here, not interpreted: tests/gpu runs them natively")
    blocks = Blocks(16, 8)  # of few rows, so that a tile of keys has several intervals of text
    backend = TritonBackend(Tuning(blocks, blocks, blocks, visual_splits=2, key_splits=2))
    compare(backend, OPTIONS[name], torch.float32, 1e-6, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_in_half_precision_it_is_off_by_rounding_alone(backend, dtype, monkeypatch):
    """Outputs and gradients are as far from the exact ones as without sharing, within a factor 2.

    All start from inputs rounded alike; of copies the exact sum of their rounded gradients counts.
    """
    monkeypatch.setattr("tests.unit.layers.test_attention.DIM", DIM)
    params, apart = shared(), build_seq_params(LAYOUTS, t2v_position="none", multiple=MULTIPLE)
    own = rows_of_copies(params, apart)
    rounded = [x.detach().to(dtype) for x in make_inputs(params, dim=DIM)[:5]]
    weight = torch.randn(rounded[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight[sum(params.text_lengths) :] = 0
    found = {}
    for name, kind, rows in (
        ("exact", torch.float64, params),
        ("shared", dtype, params),
        ("apart", dtype, apart),
    ):
        inputs = [x.to(kind) for x in rounded]
        if rows is apart:
            inputs[3:] = [x[own] for x in inputs[3:]]
        inputs = [x.requires_grad_() for x in inputs]
        out = attended(BACKENDS[backend], inputs, rows, OPTIONS["alpha"])
        grads = torch.autograd.grad((out * weight.to(kind)).sum(), inputs)
        if rows is apart:
            summed = [torch.zeros_like(x, dtype=torch.float64) for x in rounded[3:]]
            grads = [
                *grads[:3],
                *(
                    total.index_add(0, own, grad.double())
                    for total, grad in zip(summed, grads[3:], strict=True)
                ),
            ]
        found[name] = [out.detach().double(), *(grad.double() for grad in grads)]
    for exact, with_sharing, without in zip(*found.values(), strict=True):
        error, usual = (with_sharing - exact).norm(), (without - exact).norm()
        assert 0 < error <= 2 * usual
        assert error < 4 * torch.finfo(dtype).eps * exact.norm()
