"""Backends whose package is there and does not work here: said when they are chosen."""

import re
import subprocess
import sys
import sysconfig
import types

import pytest
import torch

from dattn_mcore.errors import ConfigError
from dattn_mcore.layers.attention import (
    AttentionOptions,
    choose_backend,
    flash,
    triton_backend,
    triton_trial,
)
from dattn_mcore.parallel.packages import import_problem
from tests.unit.layers import flash_stand_in

PLAIN = AttentionOptions(scale=0.1)
BF16 = torch.bfloat16
GPU = torch.device("cu" + "da")


@pytest.fixture
def forgotten():
    """What is tried once a process is tried again."""
    caches = (triton_backend.launch_problem, flash._problem, import_problem)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


NO_COMPILER = RuntimeError(
    "Failed to find C compiler. Please specify via CC environment variable or set "
    "triton.knobs.build.impl."
)
NO_HEADER = subprocess.CalledProcessError(1, ["gcc", "main.c", "-O3"])
NO_DRIVER = RuntimeError("0 active drivers ([]). There should only be one.\nof many lines")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (NO_COMPILER, "Failed to find C compiler.*build.impl. Install gcc, or name a compiler in"),
        (NO_HEADER, "finds no /nowhere/Python.h; install Python's headers .python3-dev."),
        (NO_DRIVER, "0 active drivers"),
    ],
    ids=["compiler", "header", "driver"],
)
def test_a_triton_that_launches_nothing_is_no_choice(monkeypatch, forgotten, error, reason):
    tried = []

    def launch(device):
        tried.append(device)
        raise error

    monkeypatch.setattr(triton_trial, "launch", launch)
    monkeypatch.setattr(triton_backend, "current_device", lambda: GPU)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": "/nowhere"})
    choice = choose_backend("auto", PLAIN, "gpu", BF16, 128)
    assert choice.name == "sdpa" and "\n" not in choice.reason
    assert re.search(
        f"not triton: it cannot launch a kernel on this machine: .*{reason}", choice.reason
    )
    with pytest.raises(ConfigError, match="^attention.backend=triton cannot be used: it cannot la"):
        choose_backend("triton", PLAIN, "gpu", BF16, 128)
    assert tried == [GPU]  # once


def test_a_triton_that_launches_is_chosen():
    """On the interpreter, or on a GPU: the trial itself."""
    assert triton_backend.launch_problem(torch.device("cpu")) is None


def test_a_dry_run_tries_nothing():
    assert choose_backend("triton", PLAIN, "gpu", BF16, 128).name == "triton"


def older_3():
    """flash-attn 3 of the release 2.8.3: a window is a pair."""

    def _flash_attn_forward(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1)):
        raise AssertionError

    def _flash_attn_backward(dout, q, window_size=(-1, -1), softcap=0.0, deterministic=False):
        raise AssertionError

    module = types.ModuleType("flash_attn_interface")
    module._flash_attn_forward = _flash_attn_forward
    module._flash_attn_backward = _flash_attn_backward
    return module


def operators(module, *names):
    """The module with functions that do not tell their arguments, as PyTorch's operators do."""
    for name in names:
        function = getattr(module, name)
        setattr(module, name, lambda *args, function=function, **kwargs: function(*args, **kwargs))
    return module


BACKWARD = "_flash_attn_backward"


@pytest.mark.parametrize(
    ("module", "problem"),
    [
        (older_3, "too old or of another kind: its functions have no argument window_size_"),
        (lambda: types.ModuleType("flash_attn_interface"), "too old or of another kind"),
        (flash_stand_in.flash_attn_3, None),
        (lambda: operators(flash_stand_in.flash_attn_3(), "_flash_attn_forward", BACKWARD), None),
        (lambda: operators(older_3(), "_flash_attn_forward"), "no argument window_size_"),
    ],
    ids=["older", "empty", "newer", "operators", "half"],
)
def test_a_flash_attn_3_with_other_arguments_is_no_choice(monkeypatch, forgotten, module, problem):
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module())
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setattr(flash, "is_hopper", lambda: True)
    choice = choose_backend("auto", PLAIN, "gpu", BF16, 128)
    if problem is None:
        assert choice.name == "flash" and "flash-attn 3 computes" in choice.reason
        return
    assert choice.name != "flash" and problem in choice.reason
    with pytest.raises(ConfigError, match="flash-attn 3 is too old"):
        choose_backend("flash", PLAIN, "gpu", BF16, 128)


@pytest.mark.parametrize("older", [True, False])
def test_flash_attn_2_is_looked_at_alike(monkeypatch, forgotten, older):
    module = flash_stand_in.flash_attn_2()
    if older:
        module._flash_attn_varlen_backward = lambda dout, q, window_size: None
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", module)
    monkeypatch.setattr(flash, "is_hopper", lambda: False)
    choice = choose_backend("auto", PLAIN, "gpu", BF16, 128)
    assert (choice.name == "flash") == (not older)
    assert ("flash-attn 2 is too old" in choice.reason) == older
