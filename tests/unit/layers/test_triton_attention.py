"""The joint Triton kernel, interpreted on a CPU, against `reference` in float64.

Bounds come from `joint_bounds`, which works them out of the dtype and the numbers at hand.
"""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from dattn_mcore.layers.attention import BACKENDS, AttentionInputs, AttentionOptions, Rotary
from dattn_mcore.layers.attention.frequencies import query_factor
from dattn_mcore.layers.attention.modes import softmaxes
from dattn_mcore.layers.attention.rotary import rotary_angles
from dattn_mcore.layers.attention.triton_tuning import Blocks, Tuning
from dattn_mcore.layers.layout import build_seq_params
from tests.pairwise import pairwise
from tests.unit.layers.joint_bounds import dense, samples_and_reading
from tests.unit.layers.test_attention import (
    LAYOUTS,
    MODES,
    NOT_STRETCHED,
    YARN,
    compare,
    options_for,
)

triton = pytest.importorskip("triton", reason="needs triton (pip install triton)")
pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret,
    reason="kernels are compiled here, not interpreted: tests/gpu runs them natively",
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GRADIENTS = ("q", "k_text", "v_text", "k_visual", "v_visual")


def tuning(queries=16, keys=16, visual_splits=1, key_splits=1):
    blocks = Blocks(queries, keys)
    return Tuning(blocks, blocks, blocks, visual_splits, key_splits)


def text_softmax(params, options, tuned=None):
    """Schedule and setting with which the kernel computes the text rows of a pack."""
    from dattn_mcore.layers.attention.triton_backend import schedule_of, setting_of

    (softmax,) = softmaxes(params, options)
    device = params.reading_order.device
    return {
        "schedule": schedule_of(softmax, params, device),
        "setting": setting_of(softmax, options, tuned or Tuning()),
    }


def named(inputs):
    return dict(zip(GRADIENTS, inputs, strict=True))


def check_joint(
    layouts,
    *,
    heads=2,
    groups=1,
    dim=16,
    dtype=torch.float32,
    softcap=None,
    window=None,
    multiple=1,
    tuned=None,
    seed=0,
    device="cpu",
    even=False,
    stretched=NOT_STRETCHED,
):
    """Outputs, log-sum-exps and all gradients of one pack, element by element.

    With `even`, logits are small, and values and the output's gradient above zero: bounds are tight
    and sums grow with every block.
    """
    from dattn_mcore.layers.attention.triton_backend import joint

    options = AttentionOptions(scale=dim**-0.5, softcap=softcap, window=window)
    params = build_seq_params(layouts, t2v_position="none", multiple=multiple)
    generator = torch.Generator().manual_seed(seed)
    t, v = params.num_text, params.num_visual
    sizes = [(t, heads), (t, groups), (t, groups), (v, groups), (v, groups), (t, heads)]
    rows = [torch.randn(n, h, dim, generator=generator).to(dtype) for n, h in sizes]
    if even:
        factors = (2.0**-6, 1.0, None, 1.0, None, None)
        rows = [x.abs() if f is None else x * f for x, f in zip(rows, factors, strict=True)]
    *inputs, d_out = rows
    real_rows = (samples_and_reading(params)[0][params.num_visual :] >= 0)[:, None, None]
    d_out = d_out * real_rows  # nobody reads padding rows
    angles = rotary_angles(params.text_positions, 100.0 ** -(torch.arange(0, dim, 2) / dim))

    exact = [x.double().requires_grad_() for x in inputs]
    rotary = Rotary(
        text=angles.double(),
        visual=torch.zeros(v, 1, 1, dim, dtype=torch.float64),
        rope=stretched,
    )
    factor = query_factor(params.text_positions, stretched, torch.float64)
    rows_of_pack = AttentionInputs(**named(exact), q_visual=None, rotary=rotary, params=params)
    want_out, _ = BACKENDS["reference"].attend(rows_of_pack, options)
    want = (None,) * len(exact)
    if want_out.requires_grad:
        want = torch.autograd.grad(want_out, exact, d_out.double(), allow_unused=True)
    eps = torch.finfo(dtype).eps
    oracle = dense(exact, d_out.double(), angles.double(), params, options, eps, factor)
    reference = dict(zip(("out", *GRADIENTS), (want_out.detach(), *want), strict=True))

    leaves = [x.to(device).requires_grad_() for x in inputs]
    there = build_seq_params(layouts, t2v_position="none", multiple=multiple, device=device)
    computed = text_softmax(there, options, tuned)
    factor = query_factor(there.text_positions, stretched)
    out, lse = joint(**named(leaves), angles=angles.to(device), factor=factor, **computed)
    assert out.dtype == dtype and lse.dtype == torch.float32
    grads = torch.autograd.grad(out, leaves, d_out.to(device), allow_unused=True)

    actual_lse, seen = lse.cpu().double(), oracle.lse > -torch.inf
    assert (actual_lse[~seen] == -torch.inf).all(), "lse of a row that sees nothing"
    error, bound = (actual_lse - oracle.lse).abs()[seen], oracle.lse_bound[seen]
    assert (error <= bound).all(), f"lse: {(error / bound).max():.2f} times the bound"
    for name, actual in zip(("out", *GRADIENTS), (out, *grads), strict=True):
        expected = reference[name]
        if expected is None:
            expected = torch.zeros_like(oracle.values[name])
        # The bound's own arithmetic is exact to float64, as is `reference`.
        torch.testing.assert_close(oracle.values[name], expected, atol=1e-10, rtol=1e-10)
        actual = torch.zeros_like(expected) if actual is None else actual.cpu().double()
        error, bound = (actual - expected).abs(), oracle.bounds[name] + 1e-12
        if dtype is torch.float16:
            bound = bound + 2.0**-24  # half of its smallest number: below, rounding is absolute
        assert (error <= bound).all(), f"{name}: {(error / bound).max():.2f} times the bound"


# Three packs that together hold: one token, text before an image, images between text, text-only
# samples, images that nobody sees, and lengths on both sides of a block of 16.
PACKS = (
    (((True, 17), (False, 9)), ((False, 1),)),
    (((False, 2), (True, 5), (False, 6), (True, 12), (False, 3)),),
    (((False, 17),), ((True, 16), (False, 1), (True, 3))),
)
FACTORS = {
    "dim": (64, 128, 256),
    "dtype": tuple(DTYPES),
    "softcap": (None, 1.5),
    "window": (None, 3),
    "splits": (1, 3),
    "layouts": PACKS,
    "heads": ((2, 1), (2, 2), (3, 1)),  # of queries, and of keys and values
    "multiple": (1, 8),
    "stretched": (NOT_STRETCHED, YARN),
}
CASES = pairwise(FACTORS)


def case_id(case):
    heads, groups = case["heads"]
    named = [name for name in ("softcap", "window") if case[name]]
    named += ["split"] if case["splits"] > 1 else []
    named += ["scaled"] if case["stretched"] == YARN else []
    return "-".join([f"{case['dtype']}-{case['dim']}-heads{heads}of{groups}", *named])


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_every_pair_of_settings_equals_reference(case):
    heads, groups = case["heads"]
    check_joint(
        case["layouts"],
        heads=heads,
        groups=groups,
        dim=case["dim"],
        dtype=DTYPES[case["dtype"]],
        softcap=case["softcap"],
        window=case["window"],
        multiple=case["multiple"],
        stretched=case["stretched"],
        tuned=tuning(queries=32, visual_splits=case["splits"], key_splits=case["splits"]),
    )


# Runs of a sample: text (zero rows included) before each image, and text after the last.
runs = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 19)), max_size=2)
samples = st.tuples(runs, st.integers(0, 21))


# Without shrinking, which takes minutes here; the message names all that was drawn.
@settings(max_examples=20, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    drawn=st.lists(samples, min_size=1, max_size=2),
    shape=st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 1)]),
    dim=st.sampled_from([16, 32, 64, 128, 256]),
    dtype=st.sampled_from(sorted(DTYPES)),
    softcap=st.sampled_from([None, 0.9, 30.0]),
    window=st.sampled_from([None, 1, 3, 100]),
    multiple=st.sampled_from([1, 4]),
    queries=st.sampled_from([16, 32]),
    keys=st.sampled_from([8, 16]),
    splits=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 9),
    stretched=st.sampled_from([NOT_STRETCHED, YARN]),
)
def test_drawn_packs_equal_reference(
    drawn, shape, dim, dtype, softcap, window, multiple, queries, keys, splits, seed, stretched
):
    layouts = []
    for images, last in drawn:
        layout = [run for text, v in images for run in ((False, text), (True, v)) if run[1]]
        layouts.append((*layout, (False, last)) if last else tuple(layout))
    check_joint(
        tuple(layouts),
        heads=shape[0],
        groups=shape[1],
        dim=dim,
        dtype=DTYPES[dtype],
        softcap=softcap,
        window=window,
        multiple=multiple,
        tuned=tuning(queries, keys, *splits),
        seed=seed,
        stretched=stretched,
    )


def test_long_sums_are_kept_in_float32():
    """Over tens of blocks: a sum rounded to bf16 after each would be several roundings off."""
    blocks = Tuning(Blocks(128, 8), Blocks(128, 64), Blocks(16, 64), 1, 1)
    layouts = (((True, 480), (False, 320)),)
    check_joint(layouts, dim=64, dtype=torch.bfloat16, tuned=blocks, even=True)


@pytest.mark.parametrize(
    "layouts",
    [
        (((False, 1),),),
        (((True, 1), (False, 1)),),
        (((True, 3),),),  # nobody asks
        ((),),  # a sample without rows
        (((False, 2), (True, 4)), ((True, 20),)),  # an image after the text; a sample without text
    ],
    ids=["one-token", "one-of-each", "no-text", "empty", "unseen-images"],
)
def test_edges_equal_reference(layouts):
    check_joint(layouts, multiple=2)


@pytest.mark.parametrize("mode", MODES, ids="-".join)
def test_all_modes_equal_the_oracle(mode):
    """In float32, through the backend's own signature; the tolerance is that of `test_float32`."""
    window = 3 if mode[1] == "none" or mode == ("causal", "rope", "alpha") else None
    options = options_for(mode, softcap=0.8, window=window)
    compare(
        "triton",
        LAYOUTS[:1] + LAYOUTS[2:4],
        options,
        dtype=torch.float32,
        atol=2e-5,
        stretched=YARN,
    )


def results_of_a_call(device, rows, dim, tuned=None):
    """Output and gradients of one sample of (visual, text) rows in bf16."""
    from dattn_mcore.layers.attention.triton_backend import joint

    visual, text = rows
    layouts = (((True, visual), (False, text)),)
    params = build_seq_params(layouts, t2v_position="none", device=device)
    generator = torch.Generator().manual_seed(3)
    sizes = [(text, 4), (text, 2), (text, 2), (visual, 2), (visual, 2)]
    leaves = [torch.randn(n, h, dim, generator=generator).bfloat16() for n, h in sizes]
    leaves = [leaf.to(device).requires_grad_() for leaf in leaves]
    angles = torch.randn(text, 1, 1, dim, generator=generator).to(device)
    options = options_for(MODES[0])
    out, _ = joint(**named(leaves), angles=angles, **text_softmax(params, options, tuned))
    return [out, *torch.autograd.grad(out.float().sum(), leaves)]


def test_results_do_not_depend_on_chance():
    """The same call gives the same bits, whatever splits the loops; no sum is made by atomics."""
    splits = tuning(visual_splits=3, key_splits=2)
    first, second = (results_of_a_call("cpu", (40, 5), 16, splits) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
