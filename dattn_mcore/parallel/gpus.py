"""Which GPUs of this machine PyTorch can use, why not the others, and which one a process takes."""

from __future__ import annotations

import functools
import logging
import os
import re
import warnings
from pathlib import Path

import torch

from dattn_mcore.errors import ConfigError, first_line

logger = logging.getLogger(__name__)
# Oldest driver for a major version of CUDA (NVIDIA's "CUDA Compatibility").
_OLDEST_DRIVER = {"12": "525", "13": "580"}
_CUDA_12 = "+cu126 or +cu128 at the end of its version"
# What PyTorch warns of where it cannot initialise the driver begins so.
_NO_START = "CUDA initialization: "


@functools.cache
def found_gpus() -> tuple[int, str | None]:
    """GPUs that PyTorch can use, and what it says of those that it cannot use.

    It says so in a warning, once a process.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        counted = torch.cuda.device_count()  # the driver's own count, where it tells one
        usable = counted > 0 and torch.cuda.is_available()
    reason = None
    for warning in said:
        if str(warning.message).startswith(_NO_START):
            reason = str(warning.message).splitlines()[0].removeprefix(_NO_START)
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    if usable:
        return counted, None
    if counted > 0 and reason is None:  # the warning came before
        reason = _why_no_start()
    if reason is None:
        return 0, None
    reason = reason.partition(" (Triggered internally")[0].rstrip(". ")
    return 0, f"the driver counts {counted} GPUs: {reason}" if counted > 0 else reason


def _why_no_start() -> str:
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return first_line(error)
    return "PyTorch does not say why"


def gpu_available() -> bool:
    """Whether this machine has a GPU that PyTorch can use."""
    return found_gpus()[0] > 0


def gpu_count() -> int:
    """Number of GPUs of this machine that PyTorch can use."""
    return found_gpus()[0]


def gpu_problem() -> str | None:
    """Why PyTorch cannot use this machine's GPUs, and the way out; None: it can, or has none."""
    said = found_gpus()[1]
    if said is None:
        return None
    problem = f"PyTorch cannot use this machine's GPUs ({said})"
    found = re.search(r"driver on your system is too old \(found version (\d+)", said)
    built = str(torch.version.cuda)
    driver = _OLDEST_DRIVER.get(built.partition(".")[0])
    if found is None or driver is None:
        return problem
    problem += (
        f"; PyTorch {torch.__version__} is built for CUDA {built} and needs driver {driver} or "
        "newer: update the driver"
    )
    if int(found[1]) // 1000 == 12:  # 12040 is 12.4
        problem += f", or install PyTorch's build for CUDA 12 ({_CUDA_12})"
    return problem


def resolve_device(requested: str) -> str:
    """Turns `train.device` (auto, cpu or gpu) into cpu or gpu.

    Raises:
        ConfigError: gpu was asked for and there is none; or there are GPUs, and PyTorch cannot use
            them.
    """
    if requested == "cpu":
        return requested
    if gpu_available():
        return "gpu"
    if problem := gpu_problem():
        raise ConfigError(f"train.device={requested}: {problem}; or use train.device=cpu")
    if requested == "gpu":
        raise ConfigError(
            "train.device=gpu needs a GPU that PyTorch can see, and this machine has none; "
            "use train.device=cpu or install a GPU build of PyTorch"
        )
    _say_idle_gpus()
    return "cpu"


@functools.cache
def _say_idle_gpus() -> None:
    if idle := idle_gpus():
        logger.warning("%s; it computes on the CPU", idle)


def idle_gpus(devices: Path = Path("/dev")) -> str | None:
    """What keeps PyTorch from seeing a GPU that this machine shows; None: nothing, or no such.

    Args:
        devices: where Linux shows devices.
    """
    shown = len([file for file in devices.glob("nvidia*") if file.name[6:].isdigit()])
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if not shown or hidden or torch.version.cuda is not None:
        return None
    return (
        f"this machine has {shown} NVIDIA GPU{'s' if shown > 1 else ''}, and PyTorch "
        f"{torch.__version__} is a build without CUDA"
    )


def show_warnings() -> None:
    """Shows what PyTorch warns of about the device, whatever filters have been set before."""
    warnings.filterwarnings("default", module=r"torch\.cuda")


def gpu_index(local_rank: int) -> int:
    """Index, among the GPUs that this process sees, of the one it is to use.

    A launcher that shows each process one GPU of its own (Slurm's --gpus-per-task and --gpu-bind)
    makes that number 0 for everyone; else it is the process's own number on its machine.

    Args:
        local_rank: index of this process on its machine.

    Raises:
        ConfigError: this process sees too few GPUs, and none is known to be its own.
    """
    count, shown = gpu_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if local_rank < count:
        return local_rank
    if count == 1 and (shown == str(local_rank) or _slurm_binds_gpus()):
        return 0
    if count == 1:
        raise ConfigError(
            f"GPU {local_rank} is not visible: this process sees one GPU "
            f"(CUDA_VISIBLE_DEVICES={shown or ''}) and is number {local_rank} on its machine; "
            "show all of a machine's GPUs to each of its processes (srun without --gpus-per-task "
            "and --gpu-bind), or start one process"
        )
    raise ConfigError(
        f"GPU {local_rank} is not visible (this process sees {count}"
        + (f", CUDA_VISIBLE_DEVICES={shown}" if shown else "")
        + "); start no more processes on a machine than it has GPUs, or fix its driver"
    )


def _slurm_binds_gpus() -> bool:
    """Whether Slurm says that each task has one GPU of its own."""
    one_each = os.environ.get("SLURM_GPUS_PER_TASK", "").rpartition(":")[2] == "1"
    bound = os.environ.get("SLURM_GPU_BIND", "none") not in ("", "none")
    return one_each or bound or "gpu" in os.environ.get("SLURM_TRES_PER_TASK", "")


def without_gpus() -> dict[str, str]:
    """The environment of a process that is to see no GPU."""
    return {"CUDA_VISIBLE_DEVICES": ""}
