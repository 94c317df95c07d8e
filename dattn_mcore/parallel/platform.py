"""The only file of the project that knows the device: GPU with NCCL, or CPU with gloo.

`install("cpu")` makes the real Megatron-Core (0.16.1 to 0.19.2) run on CPU processes. It names CUDA
in its schedules, optimizer, RNG tracker and checkpoint writer; nothing of that is written again
here. Instead, the few names it uses are pointed at their CPU counterparts. `install` is called
once by the entry points and test fixtures, never at import, and changes nothing for a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from dattn_mcore.errors import ConfigError, FaultError, first_line
from dattn_mcore.parallel.packages import import_problem

logger = logging.getLogger(__name__)
_CPU = torch.device("cpu")
_installed: str | None = None
_in_place_of_gpu = _CPU  # where tensors go that Megatron-Core wants on a GPU, without one
ADDS_GRADIENTS = "fused_weight_gradient_mlp_cuda"  # Apex's extension
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
    index = gpu_index(local_rank)
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
        return _in_place_of_gpu == _CPU  # a rehearsal is of a GPU, and does not know its packages
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
    return gpu_available() and torch.cuda.get_device_capability()[0] == 9


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
    if requested == "cpu" or (requested == "auto" and not gpu_available()):
        torch.compile = _uncompiled


def compile_nothing() -> None:
    """Has small functions that Megatron-Core would compile at their first call run as they are.

    Its own switch comes too late for modules that have been imported.
    """
    torch.compiler.set_stance("force_eager")


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
        index = gpu_index(local_rank)
        torch.cuda.set_device(index)
        _installed = device
        return torch.device("cuda", index)
    if _installed is None:
        _install_cpu()
        _installed = device
    return _CPU


@contextlib.contextmanager
def without_memory() -> Iterator[torch.device]:
    """Inside, tensors that Megatron-Core wants on a GPU have a shape and no memory.

    Only where the CPU is installed; see `parallel.rehearsal`.

    Yields:
        The device of these tensors.
    """
    global _in_place_of_gpu
    assert _installed == "cpu"
    _in_place_of_gpu = torch.device("meta")
    try:
        yield _in_place_of_gpu
    finally:
        _in_place_of_gpu = _CPU


def settings_of_groups() -> dict[str, bool]:
    """For Megatron-Core's `initialize_model_parallel`: a rehearsal has no groups over a network."""
    return {} if _in_place_of_gpu == _CPU else {"create_gloo_process_groups": False}


def settings_of_optimizer() -> dict[str, bool]:
    """The same for its `get_megatron_optimizer`."""
    return {} if _in_place_of_gpu == _CPU else {"use_gloo_process_groups": False}


def current_device() -> torch.device:
    """The device that `install` chose; CPU before it was called."""
    return torch.device("cuda", torch.cuda.current_device()) if _installed == "gpu" else _CPU


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
    """Seeds Megatron-Core's RNG tracker; each tensor and pipeline rank derives its own seed."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def own_rng() -> contextlib.AbstractContextManager[None]:
    """Inside, what is drawn differs between the ranks of a tensor parallel group."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    return get_cuda_rng_tracker().fork()


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


def _is_gpu_device(value: Any) -> bool:
    if isinstance(value, str):
        return value.startswith("cuda")
    return isinstance(value, torch.device) and value.type == "cuda"


class _GpuNamesMeanCpu(TorchFunctionMode):
    """Maps `device="cuda"` arguments, and `.to("cuda")`, to the CPU or what stands in its place."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if kwargs and _is_gpu_device(kwargs.get("device")):
            kwargs = {**kwargs, "device": _in_place_of_gpu}
        if func is torch.Tensor.to and len(args) > 1 and _is_gpu_device(args[1]):
            args = (args[0], _in_place_of_gpu, *args[2:])
        return func(*args, **(kwargs or {}))


class _InertStream:
    """Stands where a CUDA stream or event is expected: CPU work is done when the call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = _CPU

    def __enter__(self) -> _InertStream:
        return self

    def __exit__(self, *exc: Any) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


class _DropRngWarning(logging.Filter):
    """On a CPU the model-parallel RNG *is* the CPU's, so this warning of the tracker is void."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


def natively(function: Any) -> Any:
    """Has a function call PyTorch past what maps names of GPUs, which costs microseconds a call.

    For functions that name no GPU. Transformer Engine's layers do, and a rehearsal needs the names.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _in_place_of_gpu != _CPU or "transformer_engine" in sys.modules:
            return function(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    return call


def _uncompiled(model: Any = None, **settings: Any) -> Any:
    """`torch.compile`, as a decorator with or without settings, where nothing is compiled."""
    return _uncompiled if model is None else model


def _install_cpu() -> None:
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]

    tensor_type = torch.Tensor.type

    def type_as_on_gpu(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        # Gradient clipping and the distributed optimizer compare these strings.
        if dtype is None:
            # PyTorch may call back here by name: do not prefix twice.
            name = tensor_type(self).replace("torch.meta.", "torch.", 1)
            return name if ".cuda." in name else name.replace("torch.", "torch.cuda.", 1)
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.", 1)
        return tensor_type(self, dtype, *args, **kwargs)

    torch.Tensor.type = type_as_on_gpu  # type: ignore[method-assign, assignment]

    stream = _InertStream()
    replacements: dict[str, Any] = {
        "current_device": lambda: _in_place_of_gpu,
        "set_device": lambda *a, **k: None,
        "synchronize": lambda *a, **k: None,
        "empty_cache": lambda *a, **k: None,
        "reset_peak_memory_stats": lambda *a, **k: None,
        "memory_allocated": lambda *a: 0,
        "max_memory_allocated": lambda *a: 0,
        "memory_reserved": lambda *a: 0,
        "max_memory_reserved": lambda *a: 0,
        "memory_stats": lambda *a: {},
        "Stream": _InertStream,
        "Event": _InertStream,
        "current_stream": lambda *a: stream,
        "default_stream": lambda *a: stream,
        "stream": lambda *a: contextlib.nullcontext(),
        "is_current_stream_capturing": lambda: False,  # asked by PyTorch's Adam
        "get_rng_state": lambda *a, **k: torch.get_rng_state(),
        "set_rng_state": lambda state, *a, **k: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
    }
    for name, value in replacements.items():
        setattr(torch.cuda, name, value)
    torch.cuda.random.get_rng_state = lambda *a, **k: torch.get_rng_state()

    compile_nothing()  # on a CPU it costs more than it gains, and needs a C++ compiler

    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import random as megatron_random

    schedules.forward_step = natively(schedules.forward_step)
    schedules.backward_step = natively(schedules.backward_step)
    megatron_random._set_cuda_rng_state = lambda state, *a, **k: torch.set_rng_state(state)
    logging.getLogger(megatron_random.__name__).addFilter(_DropRngWarning())
    _GpuNamesMeanCpu().__enter__()
