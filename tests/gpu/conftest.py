"""Tests that need a GPU; run them by themselves: `pytest tests/gpu`."""

import pytest

from dattn_mcore.parallel import gpus, platform


@pytest.fixture(scope="session", autouse=True)
def _platform():
    if not gpus.gpu_available():
        pytest.skip("needs a GPU, and this machine has none")
    if platform._installed == "cpu":
        pytest.skip("the CPU platform is installed in this process; run `pytest tests/gpu` alone")
    platform.install("gpu")
