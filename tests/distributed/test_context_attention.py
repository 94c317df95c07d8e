"""Attention over rows divided by context parallelism: output and gradients are those of one rank.

The oracle is that of one process: float64, one softmax a row, written without any decomposition.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from dattn_mcore.layers.layout import build_seq_params
from dattn_mcore.types import NO_IMAGES
from tests.distributed.context_jobs import NAMES, divided_attention
from tests.unit.layers import test_attention
from tests.unit.layers.test_attention import (
    DIM,
    LAYOUTS,
    NOT_STRETCHED,
    YARN,
    make_inputs,
    options_for,
    oracle,
)
from tests.unit.layers.test_shared_image_rows import LAYOUTS as SHARED
from tests.unit.layers.test_shared_image_rows import UNITS

ALPHA, SUM = ("diagonal", "none", "alpha"), ("diagonal", "none", "sum")
ON_ONE_AXIS = ("diagonal", "rope", "alpha")
LONG = (((True, 4), (False, 23)), ((False, 3), (True, 5), (False, 18)))
# All images lie on one rank where the other packs' rows pad the rest; or there are none.
ONE_SIDE = (((True, 1), (False, 5)), ((False, 9),))
TEXT_ONLY = (((False, 6),), ((False, 1),))


def check(
    pool,
    *,
    ranks,
    backend,
    mode=ALPHA,
    layouts=LAYOUTS,
    images_of=(),
    atol=1e-11,
    dtype=torch.float64,
    stretched=NOT_STRETCHED,
    dim=DIM,
    **extra,
):
    """Output and the five gradients of a pack whose rows are divided, against the oracle's."""
    options = options_for(mode, **extra)
    pack = dict(layouts=layouts, images_of=images_of, multiple=2 * ranks)
    exact, grad = inputs_of(pack, options, dim)
    wanted = by_oracle(pack, options, exact, grad, stretched)
    found = divided(
        pool,
        ranks=ranks,
        backend=backend,
        options=options,
        pack=pack,
        tensors=[tensor.to(dtype) for tensor in exact],
        grad=grad,
        stretched=stretched,
    )
    for name, whole, like in zip(("out", *NAMES), found, wanted, strict=True):
        difference = (whole.double() - like).abs().max() if len(like) else 0
        assert difference <= atol, f"{name}: {difference}"


def inputs_of(pack, options, dim):
    """Tensors of a pack by `NAMES`, and the gradient of its output; in float64."""
    params = build_seq_params(t2v_position=options.t2v_position, **pack)
    exact = [tensor.detach() for tensor in make_inputs(params, dim=dim)[: len(NAMES)]]
    generator = torch.Generator().manual_seed(1)
    return exact, torch.randn(exact[0].shape, generator=generator, dtype=torch.float64)


def by_oracle(pack, options, exact, grad, stretched=NOT_STRETCHED):
    """Output and gradients; samples that share images have copies, whose gradients add up."""
    leaves = [tensor.clone().requires_grad_() for tensor in exact]
    apart = build_seq_params(t2v_position=options.t2v_position, **{**pack, "images_of": ()})
    rows = leaves
    if pack["images_of"]:
        own = rows_of_copies(pack["layouts"], pack["images_of"], apart.num_visual)
        rows = [*leaves[:3], *(leaf[own] for leaf in leaves[3:])]
    q_visual = torch.zeros(apart.num_visual, *leaves[0].shape[1:], dtype=torch.float64)
    with mock.patch.object(test_attention, "DIM", leaves[0].shape[2]):
        out, _ = oracle([*rows, q_visual], pack["layouts"], apart, options, stretched)
    grads = torch.autograd.grad(out, leaves, grad, allow_unused=True)
    grads = [
        torch.zeros_like(leaf) if one is None else one
        for leaf, one in zip(leaves, grads, strict=True)
    ]
    return [out.detach(), *grads]


def rows_of_copies(layouts, units, padded):
    """Of each row of the samples' own images the shared row; any for those of padding."""
    lengths = [sum(rows for visual, rows in layout if visual) for layout in layouts]
    of_units = dict(zip(units, lengths, strict=True))
    order = [unit for unit in dict.fromkeys(units) if unit != NO_IMAGES]
    starts = {unit: sum(of_units[one] for one in order[:n]) for n, unit in enumerate(order)}
    rows = [
        starts[unit] + row
        for unit, length in zip(units, lengths, strict=True)
        for row in range(length)
    ]
    return torch.tensor(rows + [0] * (padded - len(rows)))


def divided(pool, *, ranks, backend, options, pack, tensors, grad, stretched=NOT_STRETCHED):
    """Output and gradients of all rows, put together from the ranks'."""
    results = pool.run(
        run_divided,
        ranks,
        dict(
            backend=backend,
            options=options,
            stretched=stretched,
            tensors=tensors,
            grad=grad,
            **pack,
        ),
    )
    wholes = [torch.full_like(tensor, torch.nan) for tensor in (tensors[0], *tensors)]
    for out, grads, places, _ in results:
        for whole, rows, found in zip(wholes, (places[0], *places), (out, *grads), strict=True):
            assert whole[rows].isnan().all(), "a row on two ranks"
            # None: of a pack without visual rows
            whole[rows] = torch.zeros_like(whole[rows]) if found is None else found
    return wholes


def run_divided(arguments):
    return divided_attention(**arguments)


@pytest.mark.parametrize("mode", [ALPHA, SUM, ON_ONE_AXIS], ids="-".join)
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_equals_the_oracle(pool, ranks, backend, mode):
    check(pool, ranks=ranks, backend=backend, mode=mode)


@pytest.mark.parametrize("mode", [ALPHA, SUM], ids="-".join)
@pytest.mark.parametrize("softcap", [None, 0.8])
def test_flash_attn_equals_the_oracle(pool, mode, softcap):
    check(pool, ranks=3, backend="flash", mode=mode, softcap=softcap, layouts=LONG, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "flash"])
@pytest.mark.parametrize("window", [3, 9])
def test_windows_equal_the_oracle(pool, backend, window):
    atol = 1e-5 if backend == "flash" else 1e-11
    check(pool, ranks=2, backend=backend, layouts=LONG, window=window, atol=atol)


def test_windows_over_positions_of_all_rows_equal_the_oracle(pool):
    check(pool, ranks=2, backend="reference", mode=ON_ONE_AXIS, layouts=LONG, window=6)


def test_soft_caps_equal_the_oracle(pool):
    check(pool, ranks=2, backend="reference", softcap=0.8)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("layouts", [ONE_SIDE, TEXT_ONLY], ids=["one-side", "text-only"])
def test_ranks_without_visual_rows_that_are_seen(pool, backend, layouts):
    check(pool, ranks=4, backend=backend, layouts=layouts)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_scaled_queries_equal_the_oracle(pool, backend):
    check(pool, ranks=2, backend=backend, stretched=YARN)


@pytest.mark.parametrize("mode", [ALPHA, SUM], ids="-".join)
@pytest.mark.parametrize("backend", ["reference", "sdpa", "flash"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_shared_images_equal_the_oracles_copies(pool, backend, ranks, mode):
    """A unit's visual rows lie on several ranks, and every sample that shows it asks all of them."""
    atol = 1e-5 if backend == "flash" else 1e-11
    pack = dict(layouts=SHARED, images_of=UNITS)
    check(pool, ranks=ranks, backend=backend, mode=mode, atol=atol, **pack)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_visual_rows_of_a_rank_that_no_row_sees(pool, backend):
    """An image at a sample's end is seen by none: all visual rows of the last two ranks."""
    layouts = (((True, 4), (False, 5)), ((False, 3), (True, 4)))
    check(pool, ranks=4, backend=backend, layouts=layouts)
    check(pool, ranks=4, backend=backend, layouts=layouts[1:])


NEAR = 2e-5  # float32, as in `test_attention`


@pytest.fixture
def interpreted():
    triton = pytest.importorskip("triton", reason="needs triton (pip install triton)")
    if not triton.knobs.runtime.interpret:
        pytest.skip("kernels are compiled here, not interpreted: tests/gpu runs them natively")


TRITON_CASES = {
    "alpha": dict(),
    "sum": dict(mode=SUM),
    "on-one-axis": dict(mode=ON_ONE_AXIS),
    "softcap": dict(softcap=0.8),
    "window": dict(window=3, layouts=LONG),
    "window-9": dict(window=9, layouts=LONG, mode=SUM),
    "scaled-queries": dict(stretched=YARN),
    "shared-images": dict(layouts=SHARED, images_of=UNITS),
    "text-only": dict(layouts=TEXT_ONLY),
    "one-side": dict(layouts=ONE_SIDE, ranks=4),
    "unseen": dict(layouts=(((True, 4), (False, 5)), ((False, 3), (True, 4))), ranks=4),
}


@pytest.mark.parametrize("case", TRITON_CASES)
def test_triton_equals_the_oracle(pool, interpreted, case):
    settings = {"ranks": 2, **TRITON_CASES[case]}
    check(pool, backend="triton", dtype=torch.float32, atol=NEAR, dim=16, **settings)


@pytest.mark.parametrize("mode", [ALPHA, SUM], ids="-".join)
@pytest.mark.parametrize("backend", ["reference", "sdpa", "flash", "triton"])
def test_bfloat16_is_off_by_rounding_alone(pool, request, backend, mode):
    """As far from the exact result of the rounded inputs as rows that are not divided.

    Twice as far is room for what is rounded once more: parts of outputs and of gradients, which
    travel in the activations' dtype. Where the rows that are not divided are computed by one
    softmax, their error is about eps / 2 of each value.
    """
    if backend == "triton":
        request.getfixturevalue("interpreted")
    options, dim = options_for(mode), 16
    pack = dict(layouts=LONG, images_of=(), multiple=4)
    exact, grad = inputs_of(pack, options, dim)
    rounded, grad = [tensor.bfloat16() for tensor in exact], grad.bfloat16()
    wanted = by_oracle(pack, options, [tensor.double() for tensor in rounded], grad.double())
    of = dict(backend=backend, options=options, pack=pack, tensors=rounded, grad=grad)
    found = divided(pool, ranks=2, **of)
    whole = divided(pool, ranks=1, **of)
    for name, one, other, like in zip(("out", *NAMES), found, whole, wanted, strict=True):
        assert one.dtype == torch.bfloat16
        error, usual = ((x.double() - like).norm() / like.norm() for x in (one, other))
        eps = torch.finfo(torch.bfloat16).eps
        assert eps / 16 < error <= 2 * usual, f"{name}: {error} and {usual}"
        assert error < 2 * eps, f"{name}: {error}"
