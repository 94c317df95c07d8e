"""Attention over rows divided by context parallelism: output and gradients are those of one rank.

The oracle is that of one process: float64, one softmax a row, written without any decomposition.
"""

from __future__ import annotations

import pytest
import torch

from dattn_mcore.layers.layout import build_seq_params
from tests.distributed.context_jobs import NAMES, divided_attention
from tests.unit.layers.test_attention import (
    LAYOUTS,
    NOT_STRETCHED,
    YARN,
    gradients,
    make_inputs,
    options_for,
    oracle,
)

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
    **extra,
):
    options = options_for(mode, **extra)
    multiple = 2 * ranks
    params = build_seq_params(
        layouts,
        t2v_position=options.t2v_position,
        multiple=multiple,
        images_of=images_of,
    )
    inputs = make_inputs(params)
    expected, _ = oracle(inputs, layouts, params, options, stretched)
    grad = torch.randn(
        expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    wanted = gradients((expected, None), inputs)[: len(NAMES)]
    results = pool.run(
        run_divided,
        ranks,
        dict(
            backend=backend,
            layouts=layouts,
            images_of=images_of,
            options=options,
            stretched=stretched,
            tensors=[tensor.detach().to(dtype) for tensor in inputs[: len(NAMES)]],
            grad=grad,
            multiple=multiple,
        ),
    )
    close = dict(rtol=0, atol=atol)
    seen = torch.zeros(len(expected), dtype=torch.int64)
    for out, grads, places, _ in results:
        seen[places[0]] += 1
        torch.testing.assert_close(out.double(), expected[places[0]], **close)
        for name, found, rows, whole in zip(NAMES, grads, places, wanted, strict=True):
            if found is None:  # of a pack without visual rows
                assert whole is None or not whole.any(), name
                continue
            whole = torch.zeros_like(found).double() if whole is None else whole[rows]
            difference = (found.double() - whole).abs().max()
            assert difference <= atol, f"gradient of {name}: {difference}"
    assert (seen == 1).all()
    return results


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
