"""The CPU platform: the names Megatron-Core uses mean the CPU, and nothing else changes."""

import os
import subprocess
import sys

import pytest
import torch

from dattn_mcore.errors import ConfigError, FaultError
from dattn_mcore.parallel import gpus, on_cpu, platform

GPU = "cu" + "da"  # the word itself belongs to parallel/platform.py and its like


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


def test_natively_names_mean_what_pytorch_says():
    """As they do where Transformer Engine's layers, which write such names, are not loaded."""

    @on_cpu.natively
    def on_a_gpu():
        return torch.zeros(2, device=GPU)

    with pytest.raises(AssertionError, match="not compiled with"):
        on_a_gpu()
    assert torch.zeros(2, device=GPU).device.type == "cpu"  # and afterwards as before


def test_gpu_asked_for_and_absent(monkeypatch):
    monkeypatch.setattr(gpus, "gpu_available", lambda: False)
    assert gpus.resolve_device("auto") == "cpu"
    with pytest.raises(ConfigError, match="train.device=gpu needs a GPU"):
        gpus.resolve_device("gpu")


VISIBLE = f"{GPU}_visible_devices".upper()


@pytest.mark.parametrize(
    ("count", "local_rank", "environment", "index"),
    [
        (8, 3, {}, 3),
        (1, 0, {}, 0),
        (1, 3, {VISIBLE: "3"}, 0),  # Slurm without cgroups: the machine's number
        (1, 3, {VISIBLE: "0", "SLURM_GPUS_PER_TASK": "1"}, 0),  # with them: always 0
        (1, 3, {VISIBLE: "0", "SLURM_GPUS_PER_TASK": "h100:1"}, 0),
        (1, 3, {VISIBLE: "0", "SLURM_GPU_BIND": "single:1"}, 0),
        (1, 3, {VISIBLE: "0", "SLURM_TRES_PER_TASK": "cpu:4,gres/gpu:1"}, 0),
        (1, 3, {VISIBLE: "0", "SLURM_GPU_BIND": "none"}, "sees one GPU .*without --gpus-per-task"),
        (1, 3, {}, "sees one GPU"),
        (4, 4, {}, "sees 4.*start no more processes"),
        (2, 3, {"SLURM_GPUS_PER_TASK": "2"}, "sees 2"),
    ],
)
def test_the_gpu_of_a_process(monkeypatch, count, local_rank, environment, index):
    for name in (VISIBLE, "SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND", "SLURM_TRES_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(gpus, "gpu_count", lambda: count)
    if isinstance(index, int):
        assert gpus.gpu_index(local_rank) == index
        return
    with pytest.raises(ConfigError, match=f"GPU {local_rank} is not visible.*{index}") as caught:
        platform.check_device("gpu", local_rank)
    assert "\n" not in str(caught.value)


def test_a_gpu_that_does_not_compute_is_a_fault(monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("uncorrectable ECC error\nCompile with ...")

    monkeypatch.setattr(gpus, "gpu_count", lambda: 8)
    monkeypatch.setattr(torch, "zeros", fails)
    message = r"^GPU 3 does not compute \(uncorrectable ECC error\); take this machine out"
    with pytest.raises(FaultError, match=message):
        platform.check_device("gpu", 3)
    platform.check_device("cpu", 3)


def test_importing_changes_nothing():
    code = (
        "import torch; before = torch.Tensor.type\n"
        "import dattn_mcore.parallel.platform, dattn_mcore.training.main\n"
        "assert torch.Tensor.type is before\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


COMPILES_NOTHING = """
from megatron.core.activations import quick_gelu  # decorated before the platform is installed
import torch
from dattn_mcore.parallel import gpus, on_cpu, platform

platform.install("cpu")
rows = torch.randn(7, 5)
torch.testing.assert_close(quick_gelu(rows), rows * torch.sigmoid(1.702 * rows))
"""


def test_nothing_is_compiled_on_a_cpu(tmp_path):
    """Also where Megatron-Core was imported before: a C++ compiler need not be there."""
    (tmp_path / "cache").mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILES_NOTHING],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "CXX": "/none"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list((tmp_path / "cache").iterdir())


LOADS_NO_COMPILER = """
import sys
from dattn_mcore.training.main import main

assert main(["--dry-run", "--device=cpu"]) == 0
import torch
import dattn_mcore.models.dattn  # what a run that is not dry imports next
assert "megatron.core.fusions.fused_bias_dropout" in sys.modules  # compiles at import
assert "torch._inductor.compile_fx" not in sys.modules
assert torch.compile(abs) is abs and torch.compile(dynamic=True)(abs) is abs
"""


def test_a_run_on_a_cpu_loads_no_compiler():
    """It costs each rank two seconds of its start."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOADS_NO_COMPILER], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
