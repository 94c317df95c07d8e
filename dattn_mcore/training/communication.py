"""What share of a step's time goes into exchanges between ranks, by PyTorch's profiler."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from torch.profiler import profile

from dattn_mcore.parallel import platform

Result = TypeVar("Result")


def with_communication_share(work: Callable[[], Result]) -> tuple[Result, float]:
    """Does some work and measures in what share of its time an exchange was under way here.

    Exchanges that computation hides count, too; so does waiting for ranks that come late. The
    profiler slows the work down a little, so this is for one step in many.

    Returns:
        The work's result, and a number between 0 and 1.
    """
    platform.synchronize()
    started = time.perf_counter()
    with profile(activities=platform.profiled_activities(), acc_events=True) as profiler:
        result = work()
        platform.synchronize()
        seconds = time.perf_counter() - started
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if platform.is_exchange(event.name)
    ]
    return result, min(1.0, _covered(spans) / 1e6 / seconds)


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of spans."""
    total, reached = 0.0, -float("inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
