"""Runs that end in the middle of a save: killed, or out of disk."""

from __future__ import annotations

import functools
import random
import time
from pathlib import Path

from benchmarks.fault_cases.case import (
    SECONDS_ALONE,
    Case,
    Workshop,
    goes_on_as_if_nothing_happened,
    last_line,
    one_line_of,
    train,
)
from tests.distributed.faults import start_ranks
from tests.ranks import end_ranks

KILLS = 20


def cases(generator: random.Random) -> list[Case]:
    """Kills at random moments of random saves, and disks that fill up in a save."""
    found = []
    for number in range(KILLS):
        step, delay = generator.randint(1, 5), generator.uniform(0, 0.25)
        asynchronous = number % 2 == 1
        name = f"{'asynchronous ' if asynchronous else ''}save of step {step} + {delay:.3f} s"
        run = functools.partial(_killed, step=step, delay=delay, asynchronous=asynchronous)
        found.append(Case(kind="kill", name=name, run=run, apart=False))
    for asynchronous in (False, True):
        for share in (0.0, 0.5, 0.99):
            name = f"{'asynchronous ' if asynchronous else ''}{share:.0%} of the largest file"
            run = functools.partial(_full_disk, share=share, asynchronous=asynchronous)
            found.append(Case(kind="disk", name=name, run=run, apart=False))
    return found


def _killed(
    folder: Path, workshop: Workshop, step: int, delay: float, asynchronous: bool
) -> str | None:
    """SIGKILL so long after a save has begun; the next start goes on from a whole checkpoint."""
    run_dir = folder / "run"
    tree = workshop.tree(run_dir, checkpoint={"save_interval": 1, "asynchronous": asynchronous})
    ranks = start_ranks(tree, folder / "killed", "nothing", world_size=1)
    try:
        saves = run_dir / "checkpoints"
        deadline = time.monotonic() + SECONDS_ALONE
        while not any((saves / f"step_{step:08d}{end}").exists() for end in (".tmp", "")):
            if time.monotonic() > deadline or not ranks[0].is_alive():
                said = (folder / "killed/rank0.log").read_text("utf-8", "replace")
                return f"before the fault it ended: {last_line(said)}"
            time.sleep(0.002)
        time.sleep(delay)
    finally:
        end_ranks(ranks)
    return goes_on_as_if_nothing_happened(tree, folder / "again", workshop)


def _full_disk(folder: Path, workshop: Workshop, share: float, asynchronous: bool) -> str | None:
    """No file may grow beyond a share of the largest one of a checkpoint.

    The system refuses the write midway, as it does on a full disk, and no file system has to be
    made for it. Step 1's checkpoint is whole, and a later start with space goes on from there.
    """
    run_dir = folder / "run"
    short = workshop.tree(run_dir, train={"steps": 1, "global_batch_size": 12})
    status, said = train(short, folder / "first")
    if status != 0:
        return f"before the fault it ended: {last_line(said)}"
    first = run_dir / "checkpoints" / "step_00000001"
    largest = max(path.stat().st_size for path in first.glob("*.distcp"))
    (folder / "full").mkdir()
    (folder / "full" / "limit").write_text(str(max(int(largest * share), 40_000)))
    tree = workshop.tree(run_dir, checkpoint={"save_interval": 1, "asynchronous": asynchronous})
    # The fault of tests/distributed/faults.py is on rank 1; here the only rank has it.
    (process,) = start_ranks(tree, folder / "full", "limited_files", world_size=1, faulty=0)
    try:
        process.join(SECONDS_ALONE)
        status = process.exitcode
    finally:
        end_ranks([process])
    said = (folder / "full" / "rank0.log").read_text("utf-8", "replace")
    if status not in (2, 4):
        return f"status {status}: {last_line(said)}"
    problem = one_line_of(said)
    if problem is not None:
        return problem
    if sorted(path.name for path in (run_dir / "checkpoints").glob("step_????????")) != [
        first.name
    ]:
        return "the checkpoint of before is gone, or one that is not whole has its name"
    return goes_on_as_if_nothing_happened(tree, folder / "again", workshop)
