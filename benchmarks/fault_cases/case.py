"""One fault: what is done, and whether the program came through it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.distributed.faults import start_ranks
from tests.distributed.small_models import small_config
from tests.ranks import end_ranks

STEPS = 6
SECONDS_ALONE = 240.0  # that a run of a few steps may take on a busy machine


@dataclass(frozen=True)
class Case:
    """A fault.

    Attributes:
        kind: `kill`, `flip`, ...; one of `benchmarks.faults.KINDS`.
        name: unique within its kind.
        run: given a folder of its own and the workshop; returns None where the program came
            through, else what it did instead. A function of a module, as it goes to a process.
        apart: in a process that many cases share, which a crash or a hang ends; False: the case
            starts processes of its own.
    """

    kind: str
    name: str
    run: Callable[[Path, Workshop], str | None]
    apart: bool = True


@dataclass(frozen=True)
class Workshop:
    """What cases share; made once, and never changed by a case.

    Attributes:
        folder: holds it.
        digits: a small data set.
    """

    folder: Path
    digits: Path

    @property
    def whole(self) -> Path:
        """A run of `STEPS` steps that nothing happened to; its last two checkpoints are kept."""
        return self.folder / "whole"

    def tree(self, run_dir: Path, **sections: Any) -> dict[str, Any]:
        """The configuration of that run in another folder, with changes."""
        shared = {
            "data": {"index_dir": str(self.folder / "index")},
            "train": {"steps": STEPS, "global_batch_size": 12},
            "checkpoint": {"save_interval": 1, "keep": 2},
        }
        tree = small_config(self.digits, run_dir, **shared)
        for name, values in sections.items():
            tree[name] = {**tree.get(name, {}), **values}
        return tree


def make_workshop(folder: Path) -> Workshop:
    """Draws the data set and trains the run that others are compared with."""
    from dattn_mcore.data.digits import DigitsSizes, prepare_digits

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sizes = DigitsSizes(align=16, pretrain=16, instruct=48, heldout=8)
    workshop = Workshop(folder, Path(prepare_digits(folder / "digits", sizes)))
    status, said = train(workshop.tree(workshop.whole), folder / "whole_log")
    if status != 0:
        raise SystemExit(f"the run that nothing happens to ended with {status}:\n{said}")
    return workshop


def train(tree: dict[str, Any], logs: Path) -> tuple[int | None, str]:
    """Trains in one process to the end; returns its exit status (None: too slow), and its words."""
    (process,) = start_ranks(tree, logs, "nothing", world_size=1)
    try:
        process.join(SECONDS_ALONE)
        status = process.exitcode
    finally:
        end_ranks([process])
    return status, (logs / "rank0.log").read_text("utf-8", "replace")


def goes_on_as_if_nothing_happened(
    tree: dict[str, Any], logs: Path, workshop: Workshop, exact: bool = True
) -> str | None:
    """Starts a run again in one process; it must end as the one that nothing happened to.

    Args:
        tree: configuration.
        logs: folder for its words.
        workshop: has the run that nothing happened to.
        exact: to the last bit; False: other ranks have added in another order before.
    """
    from tools.checkpoint_convert.verify import verify

    status, said = train(tree, logs)
    if status != 0:
        return f"started again, it ended with status {status}: {last_line(said)}"
    run_dir = Path(tree["log"]["run_dir"])
    for name in ("samples.jsonl", "data_report.json"):
        if (run_dir / name).read_text() != (workshop.whole / name).read_text():
            return f"{name} is another than without the fault"
    if not exact:
        pairs = zip(column(run_dir, "loss"), column(workshop.whole, "loss"), strict=True)
        far = [step for step, (a, b) in enumerate(pairs, start=1) if abs(a - b) > 1e-4 * abs(b)]
        return f"the loss of step {far[0]} is another than without the fault" if far else None
    for key in ("loss", "grad_norm", "lr"):
        if column(run_dir, key) != column(workshop.whole, key):
            return f"{key} is another than without the fault"
    last = f"checkpoints/step_{STEPS:08d}"
    found = verify(run_dir / last, workshop.whole / last)
    return found.differences[0] if found.differences else None


def column(run_dir: Path, key: str) -> list[Any]:
    """One measurement of all steps."""
    return [json.loads(line)[key] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def last_line(text: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def one_line_of(text: str, several: bool = False) -> str | None:
    """What is wrong with the words of a command that failed: one line is owed, no traceback.

    Args:
        text: what it said.
        several: it may name several mistakes, a line each.
    """
    if "Traceback" in text:
        return f"a traceback: {last_line(text)}"
    reported = [line for line in text.splitlines() if line.startswith(("error: ", "fault: "))]
    right = len(reported) == 1 or (several and reported)
    return None if right else f"{len(reported)} lines of errors instead of one"
