"""A rank of two that stands still, waits for data for ever, or is killed: the other ends soon."""

from __future__ import annotations

import functools
import os
import random
import signal
import time
from pathlib import Path

from benchmarks.fault_cases.case import (
    SECONDS_ALONE,
    Case,
    Workshop,
    goes_on_as_if_nothing_happened,
    last_line,
)
from tests.distributed.faults import start_ranks
from tests.ranks import end_ranks

LIMIT = 8.0  # seconds a step may take here; one takes a fraction of a second
BOUND = 60.0  # seconds in which the others must have ended


def cases(generator: random.Random) -> list[Case]:
    """Each fault once."""
    del generator
    return [
        Case(kind="rank", name=name, run=functools.partial(_gone, fault=fault), apart=False)
        for name, fault in (
            ("stopped in a step", "stopped"),
            ("waits for data", "dead_loader"),
            ("killed in a step", "killed"),
        )
    ]


def _gone(folder: Path, workshop: Workshop, fault: str) -> str | None:
    """Rank 1 goes wrong in the second step; rank 0 ends non-zero, says why, and keeps step 1."""
    run_dir = folder / "run"
    tree = workshop.tree(run_dir, health={"step_timeout_seconds": LIMIT})
    ranks = start_ranks(tree, folder / "ranks", "stopped" if fault == "killed" else fault)
    try:
        deadline = time.monotonic() + SECONDS_ALONE
        while not (folder / "ranks" / "fault").exists():
            if time.monotonic() > deadline:
                return "before the fault it stood still"
            time.sleep(0.05)
        if fault == "killed":
            os.kill(ranks[1].pid, signal.SIGKILL)
        ranks[0].join(BOUND)
        status = ranks[0].exitcode
    finally:
        end_ranks(ranks)
    said = (folder / "ranks" / "rank0.log").read_text("utf-8", "replace")
    if status is None:
        return f"rank 0 was still there after {BOUND:.0f} s"
    if status == 0:
        return "rank 0 ended with status 0"
    if "rank 1" not in said:
        return f"rank 1 is not named: {last_line(said)}"
    # Two replicas have trained the first step, so the sums differ by roundings from one's.
    alone = {**tree, "log": {**tree["log"], "run_dir": str(run_dir)}}
    problem = goes_on_as_if_nothing_happened(alone, folder / "again", workshop, exact=False)
    return problem
