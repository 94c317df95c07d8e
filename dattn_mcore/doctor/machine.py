"""The machine under a run: Python, disk, shared memory, limits, compilers and headers."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
import sysconfig
from pathlib import Path

from dattn_mcore.config.schema import Config
from dattn_mcore.doctor.report import Row
from dattn_mcore.parallel.gpu_machine import (
    SHARED_MEMORY,
    SHARED_MEMORY_ADVICE,
    TOOLKIT_ADVICE,
    headers,
    pip_headers_command,
    toolkit,
)

_SHARED_MEMORY = Path("/dev/shm")
_FOR_SOURCES = "only to compile Transformer Engine, flash-attn, Apex"


def machine_rows(config: Config) -> list[Row]:
    """Python, processors, disk, memory that processes share, limits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    run_dir = Path(config.log.run_dir).absolute()
    return [
        Row("Python", platform.python_version(), sys.executable),
        Row("system", platform.system(), platform.platform()),
        Row("processors", str(len(os.sched_getaffinity(0))), "that this process may use"),
        _space("free disk", run_dir, "of log.run_dir"),
        _shared_memory(),
        Row("open files", _limit(soft), f"at most {_limit(hard)} (ulimit -n)"),
        Row("locked memory", _limit(locked, 2**20, " MiB"), "networks with RDMA need unlimited"),
        Row(
            "OMP_NUM_THREADS",
            os.environ.get("OMP_NUM_THREADS", "not set"),
            "" if "OMP_NUM_THREADS" in os.environ else "torchrun and the Slurm files set 1",
        ),
    ]


def _limit(value: int, unit: int = 1, name: str = "") -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value // unit:,}{name}"


def _space(name: str, folder: Path, note: str) -> Row:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Row(name, "unknown", f"{folder}: {error.strerror}")
    return Row(name, _gib(free), f"{note}, at {folder}")


def _shared_memory() -> Row:
    try:
        usage = shutil.disk_usage(_SHARED_MEMORY)
    except OSError:
        return Row("shared memory", "none", f"{_SHARED_MEMORY} is missing; {SHARED_MEMORY_ADVICE}")
    note = f"{_gib(usage.free)} free at {_SHARED_MEMORY}"
    if usage.total < SHARED_MEMORY:
        note += f"; {SHARED_MEMORY_ADVICE}"
    return Row("shared memory", _gib(usage.total), note)


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"


def c_compiler() -> str | None:
    """The compiler that Triton takes: that of CC, gcc, or clang; None where there is none."""
    named = os.environ.get("CC")
    if named:
        return shutil.which(named.split()[0])
    return shutil.which("gcc") or shutil.which("clang")


def python_header() -> Path | None:
    """Where Python.h lies; None where it does not."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return header if header.is_file() else None


def triton_lacks() -> str | None:
    """What Triton needs at its first kernel and does not find here, with the way out."""
    if c_compiler() is None:
        named = os.environ.get("CC")
        what = f"CC={named} is not a command" if named else "there is no C compiler"
        return f"{what}; apt-get install gcc libc6-dev, or set CC"
    if python_header() is None:
        return (
            "Python.h is missing; apt-get install python3-dev, or take an interpreter with headers"
        )
    return None


def build_rows(has_gpus: bool) -> tuple[list[Row], list[str]]:
    """Compilers and headers, and what is missing of them on a machine with GPUs.

    Args:
        has_gpus: packages for GPUs are of use here.

    Returns:
        Rows, and lines that say what is missing and how to get it.
    """
    compiler, header, nvidia = c_compiler(), python_header(), toolkit()
    rows = [
        Row("C compiler", compiler or "not found", "Triton compiles its launcher with it"),
        Row("Python.h", "found" if header else "not found", str(header or "as above")),
        Row(
            "nvcc",
            nvidia.version or "found" if nvidia.nvcc else "not found",
            str(nvidia.nvcc) if nvidia.nvcc else _FOR_SOURCES,
        ),
    ]
    missing = []
    if lacks := triton_lacks():
        missing.append(f"for Triton: {lacks}")
    if nvidia.nvcc is None:
        missing.append(f"nvcc, {_FOR_SOURCES}: {TOOLKIT_ADVICE}")
    of_pip = False
    for one in headers():
        place = one.found or one.of_pip
        note = str(place) if place else _FOR_SOURCES
        if one.found is None and one.of_pip is not None:
            note, of_pip = f"{note}; set CPATH before you compile", True
        rows.append(Row(one.name, "found" if place else "not found", note))
        if place is None:
            missing.append(f"{one.name}, {_FOR_SOURCES}: it comes with PyTorch's build for GPUs")
    if of_pip:
        missing.append(f"before a package is compiled: {pip_headers_command()}")
    return rows, missing if has_gpus else []
