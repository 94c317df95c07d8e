"""The adapter of flash-attn 2 and 3, on a stand-in with their signatures, against the oracle."""

import sys

import pytest
import torch

from dattn_mcore.errors import ConfigError
from dattn_mcore.layers.attention import choose_backend, flash
from tests.unit.layers import flash_stand_in
from tests.unit.layers.test_attention import LAYOUTS, MODES, YARN, compare, options_for

STAND_INS = {2: flash_stand_in.flash_attn_2, 3: flash_stand_in.flash_attn_3}


@pytest.fixture(params=[2, 3])
def version(request, monkeypatch):
    module = STAND_INS[request.param]()
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "flash_attn", module)  # the parent package, for the import
    monkeypatch.setattr(flash, "flash_version", lambda head_dim: request.param)
    return request.param


# Everything is float64 but the log-sum-exp, which flash-attn keeps in float32: weights are off by
# up to 6e-8 times its size, about 3 here, and a gradient sums a few dozen of them.
TOLERANCE = 1e-5


@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("mode", MODES, ids="-".join)
def test_equals_oracle(version, mode, softcap):
    compare("flash", LAYOUTS, options_for(mode, softcap=softcap), atol=TOLERANCE)


@pytest.mark.parametrize("mode", MODES, ids="-".join)
def test_scaled_queries_equal_oracle(version, mode):
    compare("flash", LAYOUTS, options_for(mode), atol=TOLERANCE, stretched=YARN)


@pytest.mark.parametrize("mode", MODES, ids="-".join)
def test_sliding_window_equals_oracle(version, mode):
    options = options_for(mode, window=3)
    if mode[1] == "rope" and not options.is_baseline:
        with pytest.raises(ConfigError, match="sliding window"):
            choose_backend("flash", options, "gpu", torch.bfloat16, 128)
        return
    compare("flash", LAYOUTS, options, atol=TOLERANCE)


@pytest.mark.parametrize(
    "layouts",
    [
        (((False, 1),), ((False, 2),)),
        (((False, 4),), ((False, 2),)),
        (((True, 3),), ((True, 1), (False, 1))),
        (((False, 2), (True, 4)),),
    ],
    ids=["one-token", "text-only", "no-text", "unseen-image"],
)
def test_edges_equal_oracle(version, layouts):
    compare("flash", layouts, options_for(MODES[0]), atol=TOLERANCE)
