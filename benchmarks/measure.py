"""Time and peak memory of a function, on a CPU or a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from dattn_mcore.parallel import platform


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Most memory that tensors take while the function runs, beyond what they took before.

    On a CPU the allocator's own events are counted (PyTorch's profiler), on a GPU its peak
    statistics; both see temporaries inside operators.
    """
    if device.type != "cpu":
        before = platform.reset_peak_memory()
        function()
        platform.synchronize()
        return platform.peak_memory() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peak = now = 0
    for _, nbytes in changes:
        now += nbytes
        peak = max(peak, now)
    return peak


def seconds_in_turn(
    functions: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, float]:
    """Median wall-clock time of each function; they take turns, so that a load hits all.

    Each function runs once before without being measured. One that runs out of memory is left out
    of the result.
    """
    clock = time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name in list(times):
            platform.synchronize()
            start = clock()
            try:
                functions[name]()
            except torch.OutOfMemoryError:
                del times[name]
                platform.empty_cache()
                continue
            platform.synchronize()
            if turn:
                times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def matmul_rate(device: torch.device) -> float:
    """Most FLOP/s of `torch.mm` on square matrices: float32 on a CPU, bf16 on a GPU."""
    size, dtype = (1024, torch.float32) if device.type == "cpu" else (8192, torch.bfloat16)
    a, b, out = (torch.zeros(size, size, dtype=dtype, device=device) for _ in range(3))
    seconds = []
    for _ in range(10):
        platform.synchronize()
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        platform.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
