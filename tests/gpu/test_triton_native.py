"""The joint kernel compiled for the GPU, with the block sizes that training uses.

The same checks as under the interpreter (`tests/unit/layers/test_triton_attention.py`), on lengths
that fill several blocks. `pytest tests/gpu` alone: in a run of all tests kernels are interpreted.
"""

import pytest
import torch

from dattn_mcore.layers.attention.triton_backend import TritonBackend
from dattn_mcore.layers.attention.triton_tuning import Tuning
from dattn_mcore.parallel import platform
from tests.unit.layers import test_shared_visual_rows as shared
from tests.unit.layers.test_attention import YARN
from tests.unit.layers.test_triton_attention import DTYPES, check_joint, results_of_a_call

PACKS = {
    "packed": (((True, 577), (False, 130)), ((False, 1),), ((True, 1), (False, 65))),
    "interleaved": (((False, 20), (True, 300), (False, 60), (True, 129), (False, 33)),),
    "few-text": (((True, 3000), (False, 7)),),  # splits the loop over visual keys
    "edges": (((True, 5),), ((False, 1),), ((False, 3), (True, 4))),
}


@pytest.mark.parametrize("pack", PACKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(("softcap", "window"), [(None, None), (1.5, None), (None, 40), (1.5, 40)])
def test_equals_reference(pack, dtype, dim, softcap, window):
    check_joint(
        PACKS[pack],
        heads=4,
        groups=2,
        dim=dim,
        dtype=DTYPES[dtype],
        softcap=softcap,
        window=window,
        multiple=8,
        device=platform.current_device(),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotated_queries_are_scaled(dtype):
    check_joint(
        PACKS["interleaved"],
        heads=4,
        groups=2,
        dim=128,
        dtype=DTYPES[dtype],
        multiple=8,
        stretched=YARN,
        device=platform.current_device(),
    )


@pytest.mark.parametrize("tuned", [Tuning(), Tuning(visual_splits=3, key_splits=2)])
@pytest.mark.parametrize("pack", shared.PACKS)
@pytest.mark.parametrize("name", shared.OPTIONS)
def test_images_of_several_samples(name, pack, tuned):
    shared.compare(
        TritonBackend(tuned),
        shared.PACKS[pack],
        shared.OPTIONS[name],
        torch.float32,
        2e-5,
        device=platform.current_device(),
    )


@pytest.mark.parametrize("ratio", [1, 3, 7])
def test_any_number_of_heads_per_group(ratio):
    check_joint(
        PACKS["packed"],
        heads=2 * ratio,
        groups=2,
        dim=128,
        dtype=torch.bfloat16,
        tuned=Tuning(visual_splits=3, key_splits=2),
        device=platform.current_device(),
    )


def test_long_sums_and_the_same_bits_again():
    """Thousands of visual rows, split; run twice, to the last bit (nothing is added by atomics)."""
    device = platform.current_device()
    check_joint(
        (((True, 20_000), (False, 130)),),
        heads=4,
        groups=2,
        dim=128,
        dtype=torch.bfloat16,
        device=device,
        even=True,
    )
    first, second = (results_of_a_call(device, (20_000, 130), 128) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_another_length_compiles_nothing():
    """Else a run over packs of all lengths would stop for seconds, again and again."""
    from dattn_mcore.layers.attention.triton_forward import forward_kernel
    from dattn_mcore.layers.attention.triton_key_gradient import key_kernel
    from dattn_mcore.layers.attention.triton_query_gradient import query_kernel

    device = platform.current_device()
    kernels = (forward_kernel, query_kernel, key_kernel)

    def versions():
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    # Long enough that no loop is split, so that only the number of rows differs.
    results_of_a_call(device, (10_240, 10_240), 64)
    before = versions()
    for visual, text in ((10_241, 10_243), (12_345, 10_250), (16_384, 11_111)):
        results_of_a_call(device, (visual, text), 64)
    assert versions() == before
