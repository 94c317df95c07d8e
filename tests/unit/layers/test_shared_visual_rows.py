"""Packs in which blocks alone say who sees what: images of several samples, or of earlier ones.

Every backend, forward and all gradients, against one dense float64 softmax over everything that a
row sees, which is written here from the blocks and shares no code with the backends.
"""

import dataclasses
import sys

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from dattn_mcore.layers.attention import BACKENDS, AttentionInputs, AttentionOptions, Rotary, flash
from dattn_mcore.layers.attention.rotary import rotary_angles
from dattn_mcore.layers.attention.triton_backend import TritonBackend
from dattn_mcore.layers.attention.triton_tuning import Blocks, Tuning
from dattn_mcore.layers.blocks import Block, check_blocks
from dattn_mcore.layers.layout import build_seq_params
from tests.unit.layers import flash_stand_in
from tests.unit.layers.drawn_blocks import blocks_of, few_runs, runs

HEADS, GROUPS, DIM = 4, 2, 16
NAMES = ("q", "k_text", "v_text", "k_visual", "v_visual")
# Four samples with 7, 20, 4 and 6 text rows: [0, 7), [7, 27), [27, 31), [31, 37); 40 visual rows.
TEXT, VISUAL = (7, 20, 4, 6), 40
PACKS = {
    "one-image-for-all": ((0, 7, 0, 18), (7, 27, 0, 18), (27, 31, 0, 18), (33, 37, 0, 18)),
    "earlier-image-only": ((0, 7, 0, 18), (7, 27, 18, 30), (27, 31, 0, 18), (31, 37, 18, 30)),
    "second-image-only": ((0, 3, 0, 9), (3, 7, 0, 21), (7, 27, 9, 21), (31, 37, 9, 35)),
    "ends-that-fall": ((2, 7, 25, 40), (7, 12, 3, 20), (12, 27, 0, 2), (27, 31, 19, 33)),
    "several-blocks": ((0, 7, 0, 5), (0, 7, 9, 30), (7, 27, 4, 10), (7, 27, 10, 12), (7, 27, 33, 40),
                       (31, 37, 0, 40)),
    "staircases-that-meet": ((0, 3, 0, 5), (3, 7, 0, 12), (7, 9, 0, 5), (9, 27, 0, 12),
                             (27, 29, 5, 12), (29, 31, 5, 30), (31, 34, 0, 30)),
    "nobody-sees": (),
}  # fmt: skip


def params_of(blocks, text=TEXT, visual=VISUAL, device="cpu"):
    """A pack whose visual rows are one image of a sample without text."""
    layouts = (((True, visual),), *(((False, rows),) for rows in text))
    params = build_seq_params(layouts, t2v_position="none", multiple=4, device=device)
    blocks = tuple(block if isinstance(block, Block) else Block(*block) for block in blocks)
    check_blocks(blocks)
    return dataclasses.replace(params, blocks=blocks)


def make_inputs(params):
    generator = torch.Generator().manual_seed(0)
    t, v = params.num_text, params.num_visual
    sizes = [(t, HEADS), (t, GROUPS), (t, GROUPS), (v, GROUPS), (v, GROUPS)]
    rows = [torch.randn(n, h, DIM, generator=generator, dtype=torch.float64) for n, h in sizes]
    return [x.float().double().requires_grad_() for x in rows]


def turned(x, angles):
    """Rotates [rows, heads, DIM] by [rows, DIM / 2], from the definition."""
    a, b = x.chunk(2, dim=-1)
    cosine, sine = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine], dim=-1)


def dense(inputs, params, options):
    """Output of the text rows by whole score matrices [T, heads, V + T]."""
    q, k_text, v_text, k_visual, v_visual = inputs
    sees_visual = torch.zeros(params.num_text, params.num_visual, dtype=torch.bool)
    for b in params.blocks:
        sees_visual[b.text_start : b.text_stop, b.visual_start : b.visual_stop] = True
    sees_text = torch.zeros(params.num_text, params.num_text, dtype=torch.bool)
    start = 0
    for rows in params.text_lengths:
        for row in range(start, start + rows):
            first = start if options.window is None else max(start, row - options.window + 1)
            sees_text[row, first : row + 1] = True
        start += rows
    angles = params.text_positions[:, None] * inv_freq()

    def logits(a, b):
        b = b.repeat_interleave(HEADS // GROUPS, dim=1)
        found = torch.einsum("qhd,khd->qhk", a, b) * options.scale
        return (
            found if options.softcap is None else options.softcap * (found / options.softcap).tanh()
        )

    def attend(scores, sees, values):
        sees = sees[:, None].expand_as(scores)
        weights = torch.where(sees, scores.exp(), 0.0)  # scores are small here
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
        return torch.einsum("qhk,khd->qhd", weights, values.repeat_interleave(HEADS // GROUPS, 1))

    over_visual = logits(q, k_visual)
    over_text = logits(turned(q, angles), turned(k_text, angles))
    if options.merge == "sum":
        return attend(over_visual, sees_visual, v_visual) + attend(over_text, sees_text, v_text)
    return attend(
        torch.cat([over_visual, over_text], dim=-1),
        torch.cat([sees_visual, sees_text], dim=-1),
        torch.cat([v_visual, v_text]),
    )


def inv_freq():
    return 100.0 ** -(torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)


def results(backend, inputs, params, options):
    frequencies = inv_freq().to(inputs[0].device)
    rotary = Rotary(
        text=rotary_angles(params.text_positions, frequencies),
        visual=rotary_angles(params.visual_positions, frequencies),
    )
    rows = dict(zip(NAMES, inputs, strict=True))
    of_pack = AttentionInputs(**rows, q_visual=None, rotary=rotary, params=params)
    text, visual = backend.attend(of_pack, options)
    assert visual is None
    return text


def compare(backend, blocks, options, dtype, tolerance, text=TEXT, device="cpu"):
    params, there = params_of(blocks, text), params_of(blocks, text, device=device)
    exact = make_inputs(params)
    inputs = [x.detach().to(device, dtype).requires_grad_() for x in exact]
    want, out = dense(exact, params, options), results(backend, inputs, there, options)
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).double()
    weight[sum(params.text_lengths) :] = 0  # nobody reads padding rows
    torch.testing.assert_close(out.cpu().double(), want, atol=tolerance, rtol=tolerance)
    expected = torch.autograd.grad((want * weight).sum(), exact)
    actual = torch.autograd.grad((out * weight.to(device, dtype)).sum(), inputs, allow_unused=True)
    unseen = torch.ones(params.num_visual, dtype=torch.bool)
    for block in params.blocks:
        unseen[block.visual_start : block.visual_stop] = False
    for name, grad, like in zip(NAMES, actual, expected, strict=True):
        grad = torch.zeros_like(like) if grad is None else grad.cpu()
        if "visual" in name:
            assert not grad[unseen].any(), f"{name}: of a row that nobody sees"
        torch.testing.assert_close(
            grad.double(), like, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


OPTIONS = {
    "plain": AttentionOptions(scale=0.2),
    "sum": AttentionOptions(scale=0.2, merge="sum"),
    "window": AttentionOptions(scale=0.2, window=3),
    "softcap": AttentionOptions(scale=0.2, softcap=0.8),
}


# float64 with room for sums, as in `test_attention`.
@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_equals_a_dense_softmax(backend, name, pack):
    if backend == "sdpa" and name == "softcap":
        assert BACKENDS[backend].refuses(OPTIONS[name], "cpu", torch.float64, DIM)
        return
    compare(BACKENDS[backend], PACKS[pack], OPTIONS[name], torch.float64, 1e-11)


@pytest.fixture(params=[2, 3])
def flash_attn(request, monkeypatch):
    make = {2: flash_stand_in.flash_attn_2, 3: flash_stand_in.flash_attn_3}[request.param]
    module = make()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(flash, "flash_version", lambda head_dim: request.param)


# Its log-sum-exp is float32: see `test_flash_attention`.
@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("name", OPTIONS)
def test_flash_attn_equals_a_dense_softmax(flash_attn, name, pack):
    compare(BACKENDS["flash"], PACKS[pack], OPTIONS[name], torch.float64, 1e-5)


def interpreted(visual_splits, key_splits):
    triton = pytest.importorskip("triton", reason="needs triton (pip install triton)")
    if not triton.knobs.runtime.interpret:
        pytest.skip("kernels are compiled here, not interpreted: tests/gpu runs them natively")
    blocks = Blocks(16, 8)  # of few rows, so that a tile has several intervals
    return TritonBackend(
        Tuning(blocks, blocks, blocks, visual_splits=visual_splits, key_splits=key_splits)
    )


# In float32: a few dozen products of order one, each rounded by 6e-8; as `test_float32`.
@pytest.mark.parametrize(
    ("name", "splits"),
    [
        ("plain", (1, 1)),
        ("plain", (3, 2)),
        ("sum", (3, 2)),
        ("window", (1, 1)),
        ("softcap", (2, 3)),
    ],
)
@pytest.mark.parametrize("pack", PACKS)
def test_triton_equals_a_dense_softmax(name, pack, splits):
    backend = interpreted(*splits)
    compare(backend, PACKS[pack], OPTIONS[name], torch.float32, 2e-5)


@settings(max_examples=40, deadline=None)
@given(drawn=runs, backend=st.sampled_from(["reference", "sdpa"]))
def test_drawn_blocks_equal_a_dense_softmax(drawn, backend):
    blocks, text = blocks_of(drawn)
    compare(BACKENDS[backend], blocks, OPTIONS["plain"], torch.float64, 1e-11, text=(text, 3))


@settings(max_examples=6, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(drawn=few_runs)
def test_drawn_blocks_on_triton_equal_a_dense_softmax(drawn):
    blocks, text = blocks_of(drawn)
    compare(interpreted(2, 2), blocks, OPTIONS["plain"], torch.float32, 2e-5, text=(text, 3))


@pytest.mark.parametrize(
    "blocks",
    [((0, 4, 0, 5), (0, 4, 4, 9)), ((0, 4, 0, 5), (0, 4, 0, 5)), ((0, 4, 0, 5), (3, 6, 7, 9))],
    ids=["overlap", "twice", "runs-that-overlap"],
)
def test_a_row_sees_nothing_twice(blocks):
    with pytest.raises(ValueError, match="overlap"):
        check_blocks([Block(*block) for block in blocks])


def test_blocks_that_only_meet_pass():
    check_blocks([Block(*b) for b in PACKS["several-blocks"] + ((27, 31, 0, 40),)])
