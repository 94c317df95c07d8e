"""What a machine has for GPUs: its driver, the toolkit, headers, and what PyTorch was built for.

Nothing here chooses anything: `platform` does, and `dattn_mcore.doctor` shows both side by side.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_QUERY = ("index", "name", "driver_version", "memory.total", "compute_cap")
CUDA_OF_TORCH = "CUDA of PyTorch"
_SECONDS = 20.0  # a driver in trouble can keep its tool waiting for ever
# The oldest driver for each major version of CUDA. Source: NVIDIA, "CUDA Compatibility", minor
# version compatibility.
_OLDEST_DRIVER = {12: 525, 13: 580}
# What NCCL's page on troubleshooting asks containers for, whose usual size is 64 MiB.
SHARED_MEMORY = 2**30
SHARED_MEMORY_ADVICE = (
    "NCCL's own page asks for 1 GiB (docker run --shm-size=1g; Kubernetes: an emptyDir of medium "
    "Memory at /dev/shm)"
)
TOOLKIT_ADVICE = (
    "install the CUDA toolkit of the version that PyTorch is built for, and set CUDA_HOME to it"
)
# Where a header lies when pip has brought it, below site-packages/nvidia.
_HEADERS = {"nccl.h": "nccl/include", "cudnn.h": "cudnn/include"}


@dataclass(frozen=True)
class DriverGpu:
    """A GPU as its driver sees it, whatever PyTorch can do with it.

    Attributes:
        index: number on the machine.
        name: of the model.
        driver: version of the driver.
        memory: MiB.
        capability: of computation, as "9.0".
    """

    index: int
    name: str
    driver: str
    memory: int
    capability: str


def driver_gpus() -> tuple[list[DriverGpu], str | None]:
    """The GPUs that the driver's own tool lists, and what went wrong where it lists none.

    Returns:
        GPUs, and None or a reason: the tool is missing, or its own words.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return [], "nvidia-smi is not found"
    command = [tool, f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS, errors="replace"
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"nvidia-smi does not answer ({type(error).__name__})"
    gpus = [gpu for line in done.stdout.splitlines() if (gpu := _gpu(line)) is not None]
    if gpus:
        return gpus, None
    said = (done.stdout + done.stderr).strip().splitlines() or ["it lists none"]
    return [], f"nvidia-smi: {said[0]}"


def _gpu(line: str) -> DriverGpu | None:
    fields = [field.strip() for field in line.split(",")]
    if len(fields) != len(_QUERY) or not fields[0].isdigit():
        return None
    index, name, driver, memory, capability = fields
    return DriverGpu(int(index), name, driver, int(memory) if memory.isdigit() else 0, capability)


def why_unused(gpus: Sequence[DriverGpu], build: Mapping[str, str]) -> str:
    """Why PyTorch may use none of the GPUs that a driver lists.

    Args:
        gpus: from `driver_gpus`, at least one.
        build: from `torch_build`.
    """
    cuda = build.get(CUDA_OF_TORCH, "").split(".")[0]
    if not cuda.isdigit():
        return "the installed PyTorch is a build for CPUs"
    needed, driver = _OLDEST_DRIVER.get(int(cuda)), gpus[0].driver.split(".")[0]
    if needed is not None and driver.isdigit() and int(driver) < needed:
        return (
            f"it is built for CUDA {cuda}, which needs a driver of {needed} or newer, and this one "
            f"is {gpus[0].driver}: update the driver, or install a build for an older CUDA"
        )
    return "the driver's libraries may not be those of its kernel module: restart the machine"


@dataclass(frozen=True)
class TorchGpu:
    """A GPU as PyTorch sees it; fields are those of `DriverGpu`."""

    index: int
    name: str
    memory: int
    capability: str


def torch_gpus() -> list[TorchGpu]:
    """The GPUs that PyTorch can use in this process."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        capability = f"{gpu.major}.{gpu.minor}"
        found.append(TorchGpu(index, gpu.name, gpu.total_memory // 2**20, capability))
    return found


def hidden_gpus() -> str | None:
    """The variable that limits which GPUs a process sees, and its value; None where none does."""
    name = "CUDA_VISIBLE_DEVICES"
    return f"{name}={os.environ[name]}" if name in os.environ else None


def torch_build() -> dict[str, str]:
    """What the installed PyTorch was built for, and the libraries it brings; imports PyTorch."""
    import torch

    cuda = torch.version.cuda
    if cuda is None:
        return {CUDA_OF_TORCH: "none, a build for CPUs"}
    found = {CUDA_OF_TORCH: cuda}
    if torch.backends.cudnn.is_available() and (number := torch.backends.cudnn.version()):
        found["cuDNN of PyTorch"] = _cudnn_version(number)
    if torch.distributed.is_available() and torch.distributed.is_nccl_available():
        from torch.cuda import nccl

        found["NCCL of PyTorch"] = ".".join(map(str, nccl.version()))
    found["GPUs it was compiled for"] = " ".join(torch.cuda.get_arch_list()) or "none"
    return found


def _cudnn_version(number: int) -> str:
    """Version from the library's number: 92000 is 9.20.0, and before release 9 8902 was 8.9.2."""
    major = 10000 if number >= 90000 else 1000
    return f"{number // major}.{number % major // 100}.{number % 100}"


@dataclass(frozen=True)
class Toolkit:
    """NVIDIA's compiler.

    Attributes:
        nvcc: its path; None where it is not found.
        version: as "13.0"; empty where it does not say.
        home: its folder, which `CUDA_HOME` names.
    """

    nvcc: Path | None
    version: str
    home: Path | None


def toolkit() -> Toolkit:
    """The compiler that a source package would take: of `CUDA_HOME`, of PATH, or the usual one."""
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if on_path := shutil.which("nvcc"):
        homes.append(Path(on_path).parents[1])
    for home in [*homes, Path("/usr/local/cuda")]:
        nvcc = home / "bin/nvcc"
        if nvcc.is_file():
            return Toolkit(nvcc, _nvcc_version(nvcc), home)
    return Toolkit(None, "", None)


def _nvcc_version(nvcc: Path) -> str:
    try:
        done = subprocess.run(
            [str(nvcc), "--version"], capture_output=True, text=True, timeout=_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = re.search(r"release (\d+\.\d+)", done.stdout)
    return found[1] if found else ""


@dataclass(frozen=True)
class Header:
    """A header that packages with code for GPUs include.

    Attributes:
        name: of the file.
        found: a compiler finds it there; None where it does not.
        of_pip: it lies there, with PyTorch's libraries, where a compiler must be told to look.
    """

    name: str
    found: Path | None
    of_pip: Path | None


def headers() -> list[Header]:
    """The headers of NCCL and cuDNN."""
    searched = [Path(folder) for name in ("CPATH", "CPLUS_INCLUDE_PATH") for folder in _paths(name)]
    home = toolkit().home
    searched += [home / "include"] if home is not None else []
    searched += [Path("/usr/include"), Path("/usr/local/include")]
    searched += sorted(Path("/usr/include").glob("*-linux-gnu"))
    packages = Path(sysconfig.get_path("purelib")) / "nvidia"
    return [
        Header(name, _first(name, searched), _first(name, [packages / folder]))
        for name, folder in _HEADERS.items()
    ]


def pip_headers_command() -> str:
    """What tells a compiler where pip's headers lie, before a package is compiled."""
    return (
        "SP=$(python -c 'import sysconfig; print(sysconfig.get_path(\"purelib\"))')/nvidia; "
        "export CPATH=$SP/nccl/include:$SP/cu13/include:$SP/cudnn/include"
    )


def _paths(variable: str) -> list[str]:
    return [part for part in os.environ.get(variable, "").split(os.pathsep) if part]


def _first(name: str, folders: Sequence[Path]) -> Path | None:
    return next((folder / name for folder in folders if (folder / name).is_file()), None)
