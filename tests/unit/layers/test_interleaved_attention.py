"""Samples of many images and runs of text: exact, with memory linear in rows, in few kernel calls.

Memory is what the allocator hands out (`benchmarks.measure.peak_bytes`), calls are counted: nothing
here is timed.
"""

import math
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.measure import peak_bytes
from dattn_mcore.config.load import from_dict
from dattn_mcore.layers.attention import flash, sdpa
from dattn_mcore.layers.attention.rows import passes_over_images
from dattn_mcore.layers.attention.sdpa_batches import block_batches
from dattn_mcore.layers.blocks import Block
from dattn_mcore.layers.layout import build_seq_params
from dattn_mcore.plan.activations import attention_bytes
from dattn_mcore.plan.rows import rows_of
from tests.unit.layers import drawn_blocks, flash_stand_in
from tests.unit.layers.test_attention import (
    DIM,
    GROUPS,
    HEADS,
    MODES,
    compare,
    make_inputs,
    options_for,
    run,
)

CPU = torch.device("cpu")


def interleaved(images, visual_rows, text_rows):
    return (((True, visual_rows), (False, text_rows)) * images,)


# 30 pictures of a SigLIP tower with a remark after each; a film with a word after each frame.
PICTURES, FILM = interleaved(30, 729, 4), interleaved(1000, 16, 1)
UNLIKE = (
    tuple(run for i in range(40) for run in ((True, 100 + 37 * i), (False, 1 + 5 * i % 13))),
    ((False, 3), (True, 50), (False, 2), (False, 9)),
)
PACKS = {"pictures": PICTURES, "film": FILM, "unlike": UNLIKE}


def allocating_flash_attn_2():
    """flash-attn's functions without their arithmetic: what they return, they allocate."""
    module = types.ModuleType("flash_attn.flash_attn_interface")

    def forward(q, *_, **__):
        lse = torch.zeros(q.shape[1], q.shape[0])
        return torch.zeros_like(q), lse, torch.empty(0), torch.empty(0)

    def backward(*tensors, **_):
        for gradient in tensors[6:9]:
            gradient.zero_()

    module._flash_attn_varlen_forward = forward
    module._flash_attn_varlen_backward = backward
    return module


def without_arithmetic(monkeypatch):
    module = allocating_flash_attn_2()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(flash, "flash_version", lambda head_dim: 2)
    return module


@pytest.fixture(params=["sdpa", "flash"])
def counted(request, monkeypatch):
    """A backend, and the calls of its kernels in the two passes."""
    calls = {"forward": 0, "backward": 0}

    def counting(name, function):
        def count(*args, **kwargs):
            calls[name] += 1
            return function(*args, **kwargs)

        return count

    if request.param == "flash":
        module = without_arithmetic(monkeypatch)
        places = (module, "_flash_attn_varlen_forward"), (module, "_flash_attn_varlen_backward")
    else:
        places = (sdpa, "_flash_forward"), (sdpa, "_flash_backward")
    for name, (owner, function) in zip(calls, places, strict=True):
        monkeypatch.setattr(owner, function, counting(name, getattr(owner, function)))
    return request.param, calls


def step(backend, inputs, params, options):
    out, _ = run(backend, inputs, params, options)
    return torch.autograd.grad(out.sum(), inputs[:5])


def peak_in_input_sizes(backend, layouts):
    """Peak of forward and backward, as a multiple of the bytes of q, k and v of all rows."""
    options = options_for(MODES[0])
    params = build_seq_params(layouts, t2v_position="none")
    inputs = make_inputs(params, torch.float32)
    step(backend, inputs, params, options)  # the pack's index tensors exist from here on
    peak = peak_bytes(lambda: step(backend, inputs, params, options), CPU)
    return peak / sum(x.nbytes for x in inputs[:5])


# Backward, at its worst: float32 sums of the gradients of k and v; of a pass k, v, their gradients
# and the copies by which they change their shape, each of at most as many rows as there are. Keys
# and values copied for every run after an image come to 33 and 850 times the inputs.
@pytest.mark.parametrize("layouts", PACKS.values(), ids=PACKS)
def test_peak_memory_is_linear_in_rows(counted, layouts):
    backend, _ = counted
    assert peak_in_input_sizes(backend, layouts) < 6


def test_more_images_need_no_more_memory_per_row(counted):
    backend, _ = counted
    few, many = (peak_in_input_sizes(backend, interleaved(n, 64, 2)) for n in (8, 128))
    assert many < 1.15 * few


@pytest.mark.parametrize("layouts", PACKS.values(), ids=PACKS)
def test_kernel_calls_grow_with_the_logarithm_of_images(counted, layouts):
    backend, calls = counted
    options = options_for(MODES[0])
    params = build_seq_params(layouts, t2v_position="none")
    step(backend, make_inputs(params, torch.float32), params, options)
    passes = 1 + math.ceil(math.log2(max(map(len, layouts)) / 2))
    assert calls["forward"] == calls["backward"]
    if backend == "flash":
        assert calls["forward"] == passes + 1  # of which one over text
    else:
        # Its dense kernels take one number of visual rows at a time: alike images come in two a
        # pass, others are cut into powers of two. Text comes in a bucket or two.
        sizes = 2 if layouts is not UNLIKE else int(math.log2(params.num_visual))
        assert passes < calls["forward"] <= passes * sizes + 2


@pytest.mark.parametrize("layouts", [PICTURES, FILM, interleaved(2, 64, 300) * 4, UNLIKE])
def test_the_planner_counts_what_attention_works_with(monkeypatch, layouts):
    """In float32: PyTorch adds bf16 to float32 sums on a CPU by way of a copy, on a GPU not."""
    without_arithmetic(monkeypatch)
    sizes = dict(num_attention_heads=HEADS, num_query_groups=GROUPS, head_dim=DIM)
    llm = {**sizes, "hidden_size": HEADS * DIM}
    config = from_dict({"model": {"llm": llm}, "train": {"precision": "fp32"}})
    params = build_seq_params(layouts, t2v_position="none")
    inputs = make_inputs(params, torch.float32)
    out, _ = run("flash", inputs, params, options_for(MODES[0]))
    grad = torch.ones_like(out)
    peak = peak_bytes(lambda: torch.autograd.grad(out, inputs[:5], grad), CPU)
    planned = attention_bytes(config, rows_of(config, layouts, 0))
    assert 0.8 * planned < peak < planned


# Nine images of unlike sizes with text of unlike lengths between them, beside simpler samples.
MANY = (
    tuple(run for i in range(9) for run in ((True, 1 + i % 4), (False, 1 + i % 3))),
    ((False, 2),),
    ((True, 3), (True, 2), (False, 1), (False, 2), (True, 1), (False, 4), (True, 2)),
    ((True, 2), (False, 1)),
)


@pytest.mark.parametrize("mode", MODES, ids="-".join)
def test_many_images_equal_the_oracle(mode):
    compare("sdpa", MANY, options_for(mode))


@pytest.mark.parametrize("window", [None, 3])
def test_many_images_with_a_window_equal_the_oracle(window):
    compare("sdpa", MANY, options_for(MODES[0], window=window))


@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("mode", MODES, ids="-".join)
@pytest.mark.parametrize("version", [2, 3])
def test_many_images_on_flash_attn_equal_the_oracle(monkeypatch, version, mode, softcap):
    make = {2: flash_stand_in.flash_attn_2, 3: flash_stand_in.flash_attn_3}[version]
    module = make()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(flash, "flash_version", lambda head_dim: version)
    # As in test_flash_attention: its log-sum-exp is float32.
    compare("flash", MANY, options_for(mode, softcap=softcap), atol=1e-5)


def test_visual_rows_cut_into_powers_of_two_equal_the_oracle():
    """Eleven samples whose numbers of visual rows all differ: cut, they are fewer calls."""
    layouts = tuple(((True, rows), (False, 2)) for rows in range(5, 16))
    params = build_seq_params(layouts, t2v_position="none")
    assert [len(batches) for batches in block_batches(params.blocks, CPU)] == [1] * 4
    compare("sdpa", layouts, options_for(MODES[0]))


# Sums of nine rounded outputs, each off by up to 2^-9 of values near 3; the sum itself is float32.
def test_bfloat16_does_not_lose_bits_with_every_pass():
    options = options_for(MODES[0])
    params = build_seq_params(interleaved(256, 2, 1), t2v_position="none")
    exact = [x.detach().bfloat16().double().requires_grad_() for x in make_inputs(params)]
    rounded = [x.detach().bfloat16().requires_grad_() for x in exact]
    outs = [run("sdpa", x, params, options)[0] for x in (exact, rounded)]
    assert (outs[0] - outs[1].double()).abs().max() < 0.03
    weight = torch.randn(outs[0].shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    grads = [
        torch.autograd.grad((out * weight.to(out.dtype)).sum(), x[:5])
        for out, x in zip(outs, (exact, rounded), strict=True)
    ]
    for want, grad in zip(*grads, strict=True):
        assert (want - grad.double()).norm() < 0.01 * want.norm()


def check_passes(blocks, text, visual):
    """Every visible pair once, and no row twice in a pass; returns the number of passes."""
    seen = torch.zeros(text, visual, dtype=torch.int64)
    for block in blocks:
        seen[block.text_start : block.text_stop, block.visual_start : block.visual_stop] = 1
    found = torch.zeros_like(seen)
    passes = passes_over_images(blocks)
    for rectangles in passes:
        here = torch.zeros_like(seen)
        for rectangle in rectangles:
            for start, stop in rectangle.q_spans:
                part = here[start:stop, slice(*rectangle.k_span)]
                assert part.numel()
                part += 1
        used_text, used_visual = here.any(1), here.any(0)
        assert sum(one.queries for one in rectangles) == used_text.sum()
        assert sum(one.keys for one in rectangles) == used_visual.sum()
        found += here
    assert torch.equal(found, seen)
    return len(passes)


runs = st.lists(st.tuples(st.booleans(), st.integers(0, 4)), max_size=40)


@settings(max_examples=200, deadline=None)
@given(samples=st.lists(runs, min_size=1, max_size=4))
def test_passes_hold_every_visible_pair_once_and_no_row_twice(samples):
    layouts = tuple(map(tuple, samples))
    params = build_seq_params(layouts, t2v_position="none")
    passes = check_passes(params.blocks, params.num_text, params.num_visual)
    most = max(sum(1 for is_visual, rows in layout if rows and not is_visual) for layout in layouts)
    assert passes <= 1 + math.ceil(math.log2(max(most, 1)))


@settings(max_examples=200, deadline=None)
@given(drawn=drawn_blocks.runs)
def test_passes_of_any_blocks_hold_every_pair_once_and_no_row_twice(drawn):
    blocks, text = drawn_blocks.blocks_of(drawn)
    passes = check_passes(blocks, text, 41)
    staircases = len({block.visual_start for block in blocks})
    steps = len({block.visual_stop for block in blocks})
    assert passes <= staircases * (1 + math.ceil(math.log2(max(steps, 1))))


def test_samples_that_see_the_same_images_take_no_more_passes():
    """Eight conversations about the same three images, beside another sample."""
    blocks = [Block(90, 93, 30, 40)]
    for sample in range(8):
        first = 10 * sample
        blocks += [Block(first + i, first + i + 1, 0, 10 * i) for i in (1, 2, 3)]
    assert check_passes(blocks, 93, 40) == 1 + math.ceil(math.log2(3))


lengths = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=30)


@settings(max_examples=100, deadline=None)
@given(lengths=lengths)
def test_batches_of_dense_kernels_are_few_and_pad_at_most_double(lengths):
    layouts = tuple(((True, visual), (False, text)) for visual, text in lengths)
    params = build_seq_params(layouts, t2v_position="none")
    passes = block_batches(params.blocks, CPU)
    # 9 powers of two up to 300, of visual rows as of text rows that are halved from one to the next
    assert sum(map(len, passes)) <= min(len(lengths), 81)
    ones = torch.ones(params.num_text, 1)
    for batch in (batch for batches in passes for batch in batches):
        real = ones[batch.q_rows].shape[0]
        assert batch.size * batch.queries <= 2 * real
        padded = batch.padded(ones[batch.q_rows])
        assert padded.sum() == real and batch.unpadded(padded).sum() == real
