"""GPUs that are there and that PyTorch cannot use: said in one line, never a run on the CPU."""

import subprocess
import sys
import warnings

import pytest
import torch

from dattn_mcore.errors import ConfigError
from dattn_mcore.evaluation.generation import resolve_device
from dattn_mcore.parallel import gpus, platform

GPU = "cu" + "da"  # the word itself belongs to parallel/platform.py and its like
TOO_OLD = (
    f"{GPU.upper()} initialization: The NVIDIA driver on your system is too old (found version "
    "12040). Please update your GPU driver (Triggered internally at /pytorch/Functions.cpp:119.)"
)
IN_CONTAINER = f"{GPU.upper()} initialization: Unexpected error. Error 804: forward compatibility"


@pytest.fixture
def driver(monkeypatch):
    """A machine whose driver counts GPUs, with a PyTorch that says something when it is asked."""

    def install(count, said, *, usable=False, built="13.0"):
        asked = []

        def is_available():
            if said and not asked:  # PyTorch warns once a process
                warnings.warn(said, UserWarning, stacklevel=1)
            asked.append(True)
            return usable

        gpu = getattr(torch, GPU)
        if count:
            monkeypatch.setattr(gpu, "device_count", lambda: count)
        else:  # the driver's library does not count; PyTorch asks the driver itself
            monkeypatch.setattr(gpu, "device_count", lambda: int(is_available()))
        monkeypatch.setattr(gpu, "is_available", is_available)
        monkeypatch.setattr(torch.version, GPU, built)
        gpus.found_gpus.cache_clear()

    yield install
    gpus.found_gpus.cache_clear()


def refusal(device):
    with pytest.raises(ConfigError) as caught:
        gpus.resolve_device(device)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("device", ["auto", "gpu"])
def test_a_driver_that_is_too_old_is_an_error(driver, device):
    driver(8, TOO_OLD)
    platform.load_no_compiler(device)  # asks first, and must not use the one warning up
    said = refusal(device)
    assert said.startswith(f"train.device={device}: PyTorch cannot use this machine's GPUs (the ")
    assert (
        "counts 8 GPUs: The NVIDIA driver on your system is too old (found version 12040)" in said
    )
    assert "built for " + GPU.upper() + " 13.0 and needs driver 580 or newer: update" in said
    assert "or install PyTorch's build for " + GPU.upper() + " 12 (+cu126 or" in said
    assert said.endswith("; or use train.device=cpu")
    assert "Triggered" not in said
    assert gpus.resolve_device("cpu") == "cpu"


def test_a_driver_that_no_build_is_left_for_must_be_updated(driver):
    driver(1, TOO_OLD.replace("12040", "11080"))
    assert "update the driver; or use train.device=cpu" in refusal("auto")


@pytest.mark.parametrize("count", [0, 2])
def test_whatever_else_pytorch_says_is_an_error_too(driver, count):
    driver(count, IN_CONTAINER)
    assert "Error 804: forward compatibility" in refusal("auto")


def test_a_warning_that_came_before_is_asked_for_again(driver, monkeypatch):
    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12040).")

    driver(8, None)
    monkeypatch.setattr(getattr(torch, GPU), "init", init)
    assert "too old (found version 12040)" in refusal("auto")
    assert "needs driver 580" in refusal("auto")


def test_no_gpu_is_the_cpu_and_a_gpu_is_taken(driver):
    driver(0, None)
    assert gpus.resolve_device("auto") == "cpu" and gpus.gpu_problem() is None
    driver(4, None, usable=True)
    assert gpus.resolve_device("auto") == "gpu" and gpus.gpu_count() == 4


def test_other_warnings_are_passed_on(driver):
    driver(1, "GPU0 is of a kind that this build does not know", usable=True)
    with pytest.warns(UserWarning, match="GPU0 is of a kind"):
        assert gpus.gpu_available()


def test_evaluation_refuses_alike(driver):
    driver(8, TOO_OLD)
    with pytest.raises(ConfigError, match=r"^--device auto: PyTorch cannot use.*too old"):
        resolve_device("auto")
    assert resolve_device("cpu").type == "cpu"


def test_a_build_for_a_cpu_beside_gpus_is_said(monkeypatch, tmp_path):
    for name in ("nvidia0", "nvidia1", "nvidiactl", "null"):
        (tmp_path / name).touch()
    monkeypatch.delenv(f"{GPU}_visible_devices".upper(), raising=False)
    monkeypatch.setattr(torch.version, GPU, None)
    assert "this machine has 2 NVIDIA GPUs, and PyTorch" in gpus.idle_gpus(tmp_path)
    monkeypatch.setenv(f"{GPU}_visible_devices".upper(), "")
    assert gpus.idle_gpus(tmp_path) is None
    assert gpus.idle_gpus(tmp_path / "none") is None


COMMAND = f"""
import sys, warnings
import torch

gpu = torch.{GPU}
gpu.device_count = lambda: 8
gpu.is_available = lambda: warnings.warn({TOO_OLD!r}) or False
torch.version.{GPU} = "13.0"
from dattn_mcore.training.main import main

statuses = [main([]), main(["--dry-run"]), main(["--tp=2"]), main(["--device=cpu", "--dry-run"])]
warnings.warn_explicit("too new for this build", UserWarning, "a.py", 1, module="torch.{GPU}")
assert statuses == [2, 2, 2, 0], statuses
"""


def test_the_command_ends_in_one_line_and_hides_no_warning_of_the_device():
    done = subprocess.run([sys.executable, "-c", COMMAND], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3 and len(set(errors)) == 1
    assert errors[0].startswith("error: train.device=auto: PyTorch cannot use this machine's GPUs")
    assert "Traceback" not in done.stderr
    assert "UserWarning: too new for this build" in done.stderr
