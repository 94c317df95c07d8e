"""The joint kernel compiled for the GPU, with the block sizes that training uses.

The same checks as under the interpreter (`tests/unit/layers/test_triton_attention.py`), on lengths
that fill several blocks. `pytest tests/gpu` alone: in a run of all tests kernels are interpreted.
"""

import pytest
import torch

from dattn_mcore.layers.attention.triton_tuning import Tuning
from dattn_mcore.parallel import platform
from tests.unit.layers.test_triton_attention import DTYPES, check_joint

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
