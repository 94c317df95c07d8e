"""Shared fixtures. The CPU platform is installed before anything of Megatron-Core is used."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

from dattn_mcore.parallel import platform  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _platform():
    platform.install("cpu")
