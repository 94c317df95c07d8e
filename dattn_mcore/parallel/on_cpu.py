"""Megatron-Core on CPU processes: the names of the GPU that it uses, pointed at the CPU.

It names CUDA in its schedules, optimizer, RNG tracker and checkpoint writer; nothing of that is
written again here. `platform.install("cpu")` calls `install`, once a process.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
_in_place_of_gpu = CPU  # where tensors go that Megatron-Core wants on a GPU, without one


def rehearses() -> bool:
    """Whether tensors of a GPU have a shape and no memory here (`without_memory`)."""
    return _in_place_of_gpu != CPU


@contextlib.contextmanager
def without_memory() -> Iterator[torch.device]:
    """Inside, tensors that Megatron-Core wants on a GPU have a shape and no memory.

    Only where the CPU is installed; see `parallel.rehearsal`.

    Yields:
        The device of these tensors.
    """
    global _in_place_of_gpu
    _in_place_of_gpu = torch.device("meta")
    try:
        yield _in_place_of_gpu
    finally:
        _in_place_of_gpu = CPU


def natively(function: Any) -> Any:
    """Has a function call PyTorch past what maps names of GPUs, which costs microseconds a call.

    For functions that name no GPU. Transformer Engine's layers do, and a rehearsal needs the names.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if rehearses() or "transformer_engine" in sys.modules:
            return function(*args, **kwargs)
        with torch.DisableTorchFunction():
            return function(*args, **kwargs)

    return call


def compile_nothing() -> None:
    """Has small functions that Megatron-Core would compile at their first call run as they are.

    Its own switch comes too late for modules that have been imported.
    """
    torch.compiler.set_stance("force_eager")


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
        self.device = CPU

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


def uncompiled(model: Any = None, **settings: Any) -> Any:
    """`torch.compile`, as a decorator with or without settings, where nothing is compiled."""
    return uncompiled if model is None else model


def install() -> None:
    """Points the names at the CPU, for the rest of this process."""
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
