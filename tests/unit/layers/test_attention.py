"""Both backends against a float64 oracle written from the design's section 2, all modes.

The oracle works on one sample at a time with one softmax over the union of all visible keys, so
it shares neither the decomposition, nor the merge, nor the packing with the code under test.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dattn_mcore.architectures.sizes import RopeConfig
from dattn_mcore.errors import ConfigError
from dattn_mcore.layers.attention import (
    BACKENDS,
    AttentionInputs,
    AttentionOptions,
    Rotary,
    choose_backend,
)
from dattn_mcore.layers.attention.rotary import rotary_angles
from dattn_mcore.layers.layout import build_seq_params

HEADS, GROUPS, DIM = 4, 2, 8
LAYOUTS = (
    ((False, 3), (True, 5), (False, 4), (True, 2), (False, 3)),  # interleaved images
    ((False, 6),),  # text only
    ((True, 4), (False, 1)),  # one text row
    ((True, 7), (False, 5)),
    ((False, 2), (True, 1), (False, 2)),
)
MODES = list(itertools.product(("diagonal", "causal"), ("none", "rope"), ("alpha", "sum")))
NAMES = ("q", "k_text", "v_text", "k_visual", "v_visual", "q_visual")
NOT_STRETCHED = RopeConfig()
# Both factors matter, and the samples below reach into the third of its lengths.
YARN = RopeConfig(kind="yarn", original_length=3, attention_factor=1.2, query_scale_beta=0.5)


def options_for(mode, **extra):
    v2v, t2v_position, merge = mode
    return AttentionOptions(scale=0.37, v2v=v2v, t2v_position=t2v_position, merge=merge, **extra)


def make_inputs(params, dtype=torch.float64, seed=0, dim=DIM):
    generator = torch.Generator().manual_seed(seed)

    def rows(n, heads):
        return torch.randn(n, heads, dim, generator=generator, dtype=torch.float64).to(dtype)

    t, v = params.num_text, params.num_visual
    sizes = [(t, HEADS), (t, GROUPS), (t, GROUPS), (v, GROUPS), (v, GROUPS), (v, HEADS)]
    return [rows(n, heads).requires_grad_() for n, heads in sizes]


def run(backend, inputs, params, options, stretched=NOT_STRETCHED):
    dim, device = inputs[0].shape[2], inputs[0].device
    inv_freq = 100.0 ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
    rotary = Rotary(
        text=rotary_angles(params.text_positions, inv_freq),
        visual=rotary_angles(params.visual_positions, inv_freq),
        rope=stretched,
    )
    of_pack = AttentionInputs(
        q=inputs[0],
        k_text=inputs[1],
        v_text=inputs[2],
        k_visual=inputs[3],
        v_visual=inputs[4],
        q_visual=inputs[5] if options.v2v == "causal" else None,
        rotary=rotary,
        params=params,
    )
    return BACKENDS[backend].attend(of_pack, options)


def rope(x, position):
    """Rotation of one row [heads, DIM] at a position, from the definition (pairs i, i + DIM/2)."""
    half = DIM // 2
    angle = position * 100.0 ** -(torch.arange(half, dtype=torch.float64) * 2 / DIM)
    a, b = x[:, :half], x[:, half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=1)


def scale_of_a_pair(stretched, q_pos):
    """What YaRN and the scale by position make of the logit of a query and a key at positions."""
    if stretched.kind == "default":
        return 1.0
    scale = 1 + stretched.query_scale_beta * math.log(1 + q_pos // stretched.original_length)
    return stretched.attention_factor**2 * scale  # the factor once for the query, once for the key


def oracle(inputs, layouts, params, options, stretched=NOT_STRETCHED):
    q, k_t, v_t, k_v, v_v, q_v = inputs
    text_out = torch.zeros_like(q)
    visual_out = torch.zeros_like(q_v)
    on_one_axis = options.t2v_position == "rope"
    text = visual = 0
    for layout in layouts:
        rows = []  # (is_visual, row index, reading position, index among its kind)
        count = {True: 0, False: 0}
        for is_visual, n in layout:
            for _ in range(n):
                base = visual if is_visual else text
                rows.append((is_visual, base + count[is_visual], len(rows), count[is_visual]))
                count[is_visual] += 1
        for query_visual, qi, q_read, q_own in rows:
            if query_visual and options.v2v == "diagonal":
                continue
            query = q_v[qi] if query_visual else q[qi]
            q_pos = q_read if on_one_axis else q_own
            logits, values, kinds = [], [], []
            for key_visual, ki, k_read, k_own in rows:
                if k_read > q_read:
                    continue
                if query_visual and not key_visual and not on_one_axis:
                    continue
                k_pos = k_read if on_one_axis else k_own
                key = k_v[ki] if key_visual else k_t[ki]
                positioned = on_one_axis or query_visual == key_visual
                if positioned:
                    if options.window is not None and q_pos - k_pos >= options.window:
                        continue
                    pair = rope(query, q_pos), rope(key, k_pos)
                else:
                    pair = query, key
                logit = (pair[0] * pair[1].repeat_interleave(HEADS // GROUPS, 0)).sum(-1)
                logit = logit * options.scale
                if positioned:
                    logit = logit * scale_of_a_pair(stretched, q_pos)
                if options.softcap is not None:
                    logit = options.softcap * torch.tanh(logit / options.softcap)
                logits.append(logit)
                value = v_v[ki] if key_visual else v_t[ki]
                values.append(value.repeat_interleave(HEADS // GROUPS, 0))
                kinds.append(key_visual)

            def softmax(select, logits=logits, values=values):
                if not select:
                    return 0.0
                p = torch.softmax(torch.stack([logits[i] for i in select]), 0)
                return (p[..., None] * torch.stack([values[i] for i in select])).sum(0)

            if options.merge == "sum" and not query_visual:
                out = softmax([i for i, kind in enumerate(kinds) if kind])
                out = out + softmax([i for i, kind in enumerate(kinds) if not kind])
            else:
                out = softmax(list(range(len(logits))))
            target = visual_out if query_visual else text_out
            target[qi] = out
        text, visual = text + count[False], visual + count[True]
    return text_out, visual_out if options.v2v == "causal" else None


def gradients(outputs, inputs):
    generator = torch.Generator().manual_seed(1)
    total = 0.0
    for out in outputs:
        if out is not None:
            weight = torch.randn(out.shape, generator=generator, dtype=torch.float64)
            total = total + (out.double() * weight).sum()
    return torch.autograd.grad(total, inputs, allow_unused=True)


def compare(
    backend,
    layouts,
    options,
    multiple=4,
    dtype=torch.float64,
    atol=1e-11,
    stretched=NOT_STRETCHED,
):
    params = build_seq_params(layouts, t2v_position=options.t2v_position, multiple=multiple)
    expected_inputs = make_inputs(params)
    expected = oracle(expected_inputs, layouts, params, options, stretched)
    expected_grads = gradients(expected, expected_inputs)
    inputs = [x.detach().to(dtype).requires_grad_() for x in expected_inputs]
    actual = run(backend, inputs, params, options, stretched)
    real_t, real_v = sum(params.text_lengths), sum(params.visual_lengths)
    for out, want, real in zip(actual, expected, (real_t, real_v), strict=True):
        assert (out is None) == (want is None)
        if out is not None:
            torch.testing.assert_close(out[:real].double(), want[:real], atol=atol, rtol=atol)
            assert (out[real:] == 0).all()
    for name, x, grad, want in zip(
        NAMES, inputs, gradients(actual, inputs), expected_grads, strict=True
    ):
        # A gradient of zero may come as none, or (one visible key) as a difference of equal terms.
        grad, want = (torch.zeros_like(x) if g is None else g for g in (grad, want))
        torch.testing.assert_close(
            grad.double(), want.double(), atol=atol, rtol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


# float64 accumulates to a few units of 1e-16 per operation; 1e-11 leaves room for the sums.
@pytest.mark.parametrize("mode", MODES, ids="-".join)
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_equals_float64_oracle(backend, mode):
    compare(backend, LAYOUTS, options_for(mode))


@pytest.mark.parametrize("mode", MODES, ids="-".join)
def test_softcap_equals_oracle(mode):
    compare("reference", LAYOUTS, options_for(mode, softcap=0.8))


@pytest.mark.parametrize("mode", MODES, ids="-".join)
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_sliding_window_equals_oracle(backend, mode):
    options = options_for(mode, window=3)
    if backend == "sdpa" and mode[1] == "rope" and not options.is_baseline:
        with pytest.raises(ConfigError, match="sliding window"):
            choose_backend("sdpa", options, "cpu", torch.float32, DIM)
        return
    compare(backend, LAYOUTS, options)


@pytest.mark.parametrize("mode", MODES, ids="-".join)
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_scaled_queries_equal_oracle(backend, mode):
    """What is rotated is scaled; text that looks at visual rows without positions is not."""
    compare(backend, LAYOUTS, options_for(mode), stretched=YARN)


@pytest.mark.parametrize("mode", MODES, ids="-".join)
def test_scaled_queries_within_a_window_and_below_a_cap(mode):
    compare("reference", LAYOUTS, options_for(mode, window=3, softcap=0.8), stretched=YARN)


def test_each_scale_matters():
    """In D-Attn's own mode, for rows beyond the first length; those before have the factor only."""
    layouts = LAYOUTS[:1]
    params = build_seq_params(layouts, t2v_position="none")
    inputs = [x.detach() for x in make_inputs(params)]
    variants = [
        NOT_STRETCHED,
        RopeConfig(kind="yarn", original_length=3, attention_factor=1.2),
        RopeConfig(kind="yarn", original_length=3, query_scale_beta=0.5),
    ]
    plain, factor, by_position = (
        run("sdpa", inputs, params, options_for(MODES[0]), stretched)[0] for stretched in variants
    )
    assert (plain - factor)[1:].abs().amax((1, 2)).min() > 1e-4
    assert torch.equal(plain[:3], by_position[:3])
    assert (plain - by_position)[3:10].abs().amax((1, 2)).min() > 1e-4


# Samples with nothing visual, nothing but one text row, images first, last and between.
run_lengths = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), min_size=1, max_size=3)


@settings(max_examples=30, deadline=None)
@given(
    samples=st.lists(run_lengths, min_size=1, max_size=4),
    mode=st.sampled_from(MODES),
    backend=st.sampled_from(["reference", "sdpa"]),
    multiple=st.sampled_from([1, 4]),
)
def test_drawn_packs_equal_oracle(samples, mode, backend, multiple):
    layouts = []
    for sample in samples:
        runs = [run for t, v in sample for run in ((False, t), (True, v)) if run[1]]
        layouts.append((*runs, (False, 2)) if not runs or runs[-1][0] else tuple(runs))
    compare(backend, tuple(layouts), options_for(mode), multiple=multiple)


# fp32 unit roundoff is 6e-8; rows sum up to a few dozen products of order one.
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_float32(backend):
    compare(backend, LAYOUTS, options_for(MODES[0]), dtype=torch.float32, atol=2e-5)


# bf16 keeps 8 bits: inputs, weights and outputs are each rounded by up to 2^-9 of values near 3.
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_bfloat16_stays_within_rounding(backend):
    options = options_for(MODES[0])
    params = build_seq_params(LAYOUTS, t2v_position="none")
    exact = make_inputs(params)
    rounded = [x.detach().bfloat16() for x in exact]
    expected, _ = oracle([x.double() for x in rounded], LAYOUTS, params, options)
    actual, _ = run(backend, rounded, params, options)
    assert actual.dtype == torch.bfloat16
    assert (actual.double() - expected).abs().max() < 0.05


def test_diagonal_debiased_text_ignores_visual_order():
    """Text sees visual rows without positions: permuting them changes nothing."""
    params = build_seq_params((((True, 6), (False, 4)),), t2v_position="none")
    inputs = [x.detach() for x in make_inputs(params)]
    options = options_for(MODES[0])
    first, _ = run("sdpa", inputs, params, options)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3))
    inputs[3], inputs[4] = inputs[3][order], inputs[4][order]
    second, _ = run("sdpa", inputs, params, options)
    torch.testing.assert_close(first, second, atol=1e-12, rtol=0)


def test_no_score_matrix_of_text_by_visual_rows():
    """Peak size of tensors that autograd keeps stays linear in the visual rows."""
    kept = []
    layouts = (((True, 4096), (False, 512)),)
    params = build_seq_params(layouts, t2v_position="none")
    inputs = make_inputs(params, torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        out, _ = run("sdpa", inputs, params, options_for(MODES[0]))
    assert max(kept) <= 4096 * GROUPS * DIM
    assert max(kept) < 512 * 4096


def test_backend_choice_names_the_reason():
    options = options_for(MODES[0], softcap=50.0)
    choice = choose_backend("auto", options, "cpu", torch.float32, DIM)
    assert choice.name == "reference" and "soft-cap" in choice.reason
    with pytest.raises(ConfigError, match="attention.backend='fast'"):
        choose_backend("fast", options, "cpu", torch.float32, DIM)
