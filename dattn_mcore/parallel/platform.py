"""What is done with this process's device: a GPU with NCCL, or the CPU with gloo.

With `gpus` (which GPUs there are) and `on_cpu` (what stands in their place), the only files of the
project that name the device. `install` is called once by the entry points and test fixtures, never
at import, and changes nothing for a GPU.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dattn_mcore.errors import FaultError, first_line
from dattn_mcore.parallel import gpus, on_cpu
from dattn_mcore.parallel.on_cpu import CPU
from dattn_mcore.parallel.packages import import_problem

_installed: str | None = None
ADDS_GRADIENTS = "fused_weight_gradient_mlp_cuda"  # Apex's extension
# Generators of context parallel ranks in Megatron-Core's tracker: one that the ranks of a tensor
# parallel group have alike, and one of each rank.
CONTEXT_RNG = "context-parallel-rng"
OWN_CONTEXT_RNG = "context-and-tensor-parallel-rng"


def check_device(device: str, local_rank: int) -> None:
    """Uses this process's device once.

    Args:
        device: cpu or gpu.
        local_rank: index of this process on its machine.

    Raises:
        ConfigError: it has no GPU.
        FaultError: its GPU does not compute.
    """
    if device == "cpu":
        return
    index = gpus.gpu_index(local_rank)
    _order_kernels()
    try:
        torch.zeros(1024, device=torch.device("cuda", index)).sum().item()
    except RuntimeError as error:
        reason = first_line(error)
        raise FaultError(
            f"GPU {local_rank} does not compute ({reason}); take this machine out of the run"
        ) from None


def apex_adds_gradients() -> bool:
    """Whether Apex's extension is built and loads, which adds weight gradients into buffers."""
    return import_problem(ADDS_GRADIENTS) is None


def adds_gradients() -> bool:
    """Whether Megatron-Core's own linears add weight gradients into buffers in their products.

    On a GPU Apex's extension does, on a CPU what stands in for it (`fewer_passes`).
    """
    if current_device().type == "cpu":
        return not on_cpu.rehearses()  # a rehearsal is of a GPU, and does not know its packages
    return apex_adds_gradients()


def device_name() -> str:
    """What the vendor calls this process's device; empty for a CPU."""
    return torch.cuda.get_device_name() if _installed == "gpu" else ""


def peak_memory() -> int:
    """Most bytes of GPU memory in use since the start or `reset_peak_memory`; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() if _installed == "gpu" else 0


def processor_count(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU: how many programs of a kernel run at once; 1 on a CPU."""
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def is_hopper() -> bool:
    """Whether the current GPU is of NVIDIA's Hopper generation (H100, H200)."""
    return gpus.gpu_available() and torch.cuda.get_device_capability()[0] == 9


def fp8_problem(recipe: str) -> str | None:
    """Why this process's GPU cannot compute a recipe of FP8; None where it can, or on a CPU.

    Args:
        recipe: delayed, tensorwise or blockwise.
    """
    if _installed != "gpu":
        return None
    built = torch.version.cuda
    # Source: transformer_engine/pytorch, `check_fp8_block_scaling_support`.
    if recipe == "blockwise" and built and tuple(map(int, built.split(".")[:2])) < (12, 9):
        return (
            f"needs PyTorch built for CUDA 12.9 or newer, and {torch.__version__} is built for "
            f"{built}; install such a build, or use train.fp8=tensorwise"
        )
    needed = (9, 0) if recipe == "blockwise" else (8, 9)
    if torch.cuda.get_device_capability() >= needed:
        return None
    major, minor = torch.cuda.get_device_capability()
    return (
        f"needs a GPU of compute capability {needed[0]}.{needed[1]} or newer (H100), and "
        f"{device_name()} has {major}.{minor}"
    )


def hopper_target() -> Any:
    """What Triton compiles for where no GPU is at hand: NVIDIA's Hopper generation."""
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", 90, 32)


def backend(device: str) -> str:
    """The torch.distributed backend for a device (cpu or gpu)."""
    return "nccl" if device == "gpu" else "gloo"


def load_no_compiler(requested: str) -> None:
    """Spares a process without a GPU the import of PyTorch's compiler; call before Megatron-Core's.

    Megatron-Core decorates functions with `torch.compile` while it is imported, which loads the
    compiler at once: two of a rank's seven seconds, for what `install` then switches off.

    Args:
        requested: `train.device`.
    """
    if requested == "cpu" or (requested == "auto" and not gpus.gpu_available()):
        torch.compile = on_cpu.uncompiled


def install(device: str, local_rank: int = 0) -> torch.device:
    """Makes this process ready to run Megatron-Core on a device.

    Args:
        device: cpu or gpu.
        local_rank: index of this process on its machine; selects the GPU (`gpu_index`).

    Returns:
        The torch device on which parameters and activations live.

    Raises:
        RuntimeError: the other device was installed in this process before.
    """
    global _installed
    if _installed not in (None, device):
        raise RuntimeError(f"platform {_installed} is installed; {device} needs a new process")
    if device == "gpu":
        _order_kernels()
        index = gpus.gpu_index(local_rank)
        torch.cuda.set_device(index)
        _installed = device
        return torch.device("cuda", index)
    if _installed is None:
        on_cpu.install()
        _installed = device
    return CPU


def settings_of_groups() -> dict[str, bool]:
    """For Megatron-Core's `initialize_model_parallel`: a rehearsal has no groups over a network."""
    return {} if not on_cpu.rehearses() else {"create_gloo_process_groups": False}


def settings_of_optimizer() -> dict[str, bool]:
    """The same for its `get_megatron_optimizer`."""
    return {} if not on_cpu.rehearses() else {"use_gloo_process_groups": False}


def current_device() -> torch.device:
    """The device that `install` chose; CPU before it was called."""
    return torch.device("cuda", torch.cuda.current_device()) if _installed == "gpu" else CPU


def synchronize() -> None:
    """Waits until the device has done what it was given; a CPU has when a call returns."""
    torch.cuda.synchronize()


def wait_for_stream(device: torch.device) -> None:
    """Waits until a device has done what this thread's current stream of it was given."""
    if device.type != "cpu":
        torch.cuda.current_stream(device).synchronize()


def empty_cache() -> None:
    """Gives the GPU memory back that PyTorch keeps for later tensors."""
    torch.cuda.empty_cache()


def reset_peak_memory() -> int:
    """Starts a new measurement of the GPU's peak memory; returns the bytes that tensors take."""
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def profiled_activities() -> list[Any]:
    """What PyTorch's profiler must record to see exchanges between ranks."""
    from torch.profiler import ProfilerActivity

    return [ProfilerActivity.CUDA if _installed == "gpu" else ProfilerActivity.CPU]


def traced_activities() -> list[Any]:
    """What PyTorch's profiler must record to see all of a step."""
    from torch.profiler import ProfilerActivity

    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if _installed == "gpu" else [])]


def nvtx_range(name: str) -> contextlib.AbstractContextManager[None]:
    """A named range for Nsight Systems; a GPU's library must be there."""
    return torch.cuda.nvtx.range(name)


@contextlib.contextmanager
def nvtx_capture() -> Iterator[None]:
    """Operations as ranges for Nsight Systems, which can be started to record this and no more."""
    with torch.cuda.profiler.profile(), torch.autograd.profiler.emit_nvtx(record_shapes=True):
        yield


def record_memory_history() -> None:
    """Starts to record allocations of GPU memory; does nothing on a CPU.

    The functions have no other name in PyTorch's documentation ("Understanding CUDA Memory
    Usage").
    """
    if _installed == "gpu":
        torch.cuda.memory._record_memory_history()


def write_memory_snapshot(path: Path) -> None:
    """Writes what `record_memory_history` recorded, and ends it; does nothing on a CPU."""
    if _installed == "gpu":
        torch.cuda.memory._dump_snapshot(str(path))
        torch.cuda.memory._record_memory_history(enabled=None)


def is_exchange(event_name: str) -> bool:
    """Whether a profiled kernel (GPU) or operation (CPU) is an exchange between ranks."""
    return event_name.startswith(("nccl", "gloo:"))


def seed_model_parallel(seed: int) -> None:
    """Seeds Megatron-Core's RNG tracker; each tensor and pipeline rank derives its own seed.

    Context parallel ranks get two generators more, for what is drawn for rows: they have different
    ones, and Megatron-Core seeds them alike.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import (
        get_cuda_rng_tracker,
        model_parallel_cuda_manual_seed,
    )

    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    if parallel_state.get_context_parallel_world_size() == 1:
        return
    rank = parallel_state.get_context_parallel_rank()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    tensor = parallel_state.get_tensor_model_parallel_rank()
    # Far from Megatron-Core's own seeds: 100 a stage, and 2718 + the tensor rank.
    base = seed + 100 * stage + 100_003 * (1 + rank)
    get_cuda_rng_tracker().add(CONTEXT_RNG, base)
    get_cuda_rng_tracker().add(OWN_CONTEXT_RNG, base + 2718 + tensor)


def rng_of_rows(*, own: bool) -> contextlib.AbstractContextManager[None]:
    """Inside, what is drawn for rows differs between ranks that have different rows.

    Args:
        own: whether the ranks of a tensor parallel group have different rows, or columns of them;
            otherwise they draw alike.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    if parallel_state.get_context_parallel_world_size() > 1:
        return get_cuda_rng_tracker().fork(OWN_CONTEXT_RNG if own else CONTEXT_RNG)
    return get_cuda_rng_tracker().fork() if own else contextlib.nullcontext()


def rng_state() -> dict[str, Any]:
    """RNG states of this process: PyTorch's, the device's, Megatron-Core's tracker."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    return {
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Puts back what `rng_state` returned."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    torch.cuda.set_rng_state(state["device"])
    torch.set_rng_state(state["torch"])
    get_cuda_rng_tracker().set_states(state["tracker"])


def make_deterministic() -> None:
    """Has the same layout compute the same bits each time; called before the device is used.

    Libraries read the variables (cuBLAS, Transformer Engine, NCCL) when they start; values that
    are there already stay.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(True)


def _order_kernels() -> None:
    """Lets kernels start in the order of their calls, which overlapped exchanges rely on.

    Read when the device is first used.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
