"""Do two commits train alike, to the last bit?

    python -m benchmarks.compare_losses v1                  # against the working tree
    python -m benchmarks.compare_losses v1 v2 --steps 20    # stages of 20 steps
    python -m benchmarks.compare_losses v1 --layouts own one tp2 pp2 dp2
    python -m benchmarks.compare_losses v1 --settings-of v1    # where configs/digits_*.yaml changed

Trains the quickstart's stages with each of two commits: same environment, settings, seed and
layout, each stage from the weights of the one before. Loss and gradient norm of every step must be
equal bit for bit. `own` is the layout of each stage's configuration, the others are the same in
every stage. Each commit reads its own `configs/digits_*.yaml`; with `--settings-of` both read those
of one commit, which newer code translates as it does for a user. With `--steps` the learning rates'
schedule is as short as the stage. A commit is checked out into a temporary worktree; `.` is the
working tree with its changes. Trains on CPUs. Metrics and logs stay in `--out`. Exit status 1:
something differs; 2: no comparison was made.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.checkouts import WORKING_TREE, Checkout, checked_out
from benchmarks.results import markdown_table, provenance
from dattn_mcore.console import say
from dattn_mcore.errors import DattnError, error_lines
from dattn_mcore.quickstart.run import StepError, make_run_dir, run_step
from dattn_mcore.quickstart.steps import CONFIGS, PROCESSES, STAGES, make_run
from dattn_mcore.units import duration

FIELDS = ("loss", "grad_norm")
EQUAL = "equal"
# Settings, and processes to start.
LAYOUTS: dict[str, tuple[tuple[str, ...], int]] = {
    "own": ((), PROCESSES),
    "one": (("parallel.tp=1", "parallel.pp=1"), 1),
    "tp2": (("parallel.tp=2", "parallel.pp=1"), 2),
    "pp2": (("parallel.tp=1", "parallel.pp=2"), 2),
    "dp2": (("parallel.tp=1", "parallel.pp=1"), 2),
}
_QUIET = ("train.device=cpu", "log.interval=1", "log.tensorboard=false")
Row = dict[str, Any]  # a line of metrics.jsonl


@dataclass(frozen=True)
class Job:
    """What is trained with both commits.

    Attributes:
        layouts: keys of `LAYOUTS`.
        stages: the first ones of the quickstart.
        settings: `section.key=value`, for all of them.
        configs: folder of the stages' settings; relative to a commit, or absolute and for both.
    """

    layouts: tuple[str, ...]
    stages: tuple[str, ...]
    settings: tuple[str, ...]
    configs: Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, compares, prints the table; see the file's docstring."""
    args = _parser().parse_args(arguments)
    settings = [*_QUIET]
    settings += [f"train.steps={args.steps}"] if args.steps is not None else []
    settings += [f"train.seed={args.seed}"] if args.seed is not None else []
    out, started = args.out.resolve(), time.monotonic()
    try:
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dattn-compare-")))
            base = stack.enter_context(checked_out(args.base, folder / "base"))
            head = stack.enter_context(checked_out(args.head, folder / "head"))
            compared, configs = f"BASE {base.name}, HEAD {head.name}", CONFIGS
            if args.settings_of is not None:
                source = stack.enter_context(checked_out(args.settings_of, folder / "settings"))
                compared += f", settings of {source.name}"
                configs = source.folder / CONFIGS
            job = Job(
                layouts=tuple(dict.fromkeys(args.layouts)),
                stages=STAGES[: STAGES.index(args.until) + 1],
                settings=tuple(settings),
                configs=configs,
            )
            say(compared)
            trained = [train(base, job, out / "base"), train(head, job, out / "head")]
    except DattnError as error:
        sys.stderr.write(error_lines(error))
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        return 130
    rows = compare(*trained)
    table = markdown_table(("stage", "layout", "steps", "loss and gradient norm"), rows)
    sys.stdout.write(f"\n{table}\n{provenance('cpu')}\n")
    say(f"{compared}, {duration(time.monotonic() - started)}; {out}")
    return int(any(result != EQUAL for *_, result in rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare_losses", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("base", metavar="BASE", help="commit, branch or tag")
    parser.add_argument(
        "head",
        metavar="HEAD",
        nargs="?",
        default=WORKING_TREE,
        help="the same (default: . is the working tree, with its changes)",
    )
    parser.add_argument(
        "--settings-of",
        metavar="COMMIT",
        help="both read its configs/digits_*.yaml (default: each commit its own)",
    )
    parser.add_argument("--steps", type=_count, help="of each stage (default: as configured)")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=["own"])
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="last stage")
    parser.add_argument("--seed", type=int, help="of both (default: as configured)")
    parser.add_argument("--out", type=Path, default=Path("runs/compare_losses"))
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of 1 or more")
    return int(text)


def train(checkout: Checkout, job: Job, out: Path) -> dict[tuple[str, str], list[Row]]:
    """Trains every layout with the code of one commit, on data that the same code makes.

    Args:
        checkout: the commit.
        job: what to train.
        out: folder of its data set and runs; an earlier one is replaced.

    Returns:
        The metrics of every step, by stage and layout.

    Raises:
        DattnError: a stage failed or measured nothing, or `out` cannot be written.
    """
    make_run_dir(out, {"commit": checkout.name})
    logs = out / "logs"
    trained: dict[tuple[str, str], list[Row]] = {}
    with open(logs / "output.log", "w", encoding="utf-8") as output:
        console = Console(file=output)
        for layout in job.layouts:
            settings, processes = LAYOUTS[layout]
            run = make_run(
                run_dir=out / layout,
                data=out / "digits",
                overrides=[*job.settings, *settings],
                processes=processes,
                configs=job.configs,
            )
            for step in run.steps:
                if step.name not in ("data", *job.stages):
                    continue
                started = time.monotonic()
                try:
                    run_step(step, logs, console, clone=checkout.folder)
                except StepError as error:
                    raise DattnError(f"{checkout.name}, layout {layout}: {error}") from None
                if step.name == "data":
                    continue
                trained[step.name, layout] = read_metrics(run.metrics(step.name))
                taken = duration(time.monotonic() - started)
                say(f"{checkout.name}, layout {layout}, stage {step.name}: {taken}")
                sys.stdout.flush()
    return trained


def read_metrics(path: Path) -> list[Row]:
    """The steps of a run.

    Raises:
        DattnError: there is none, or one lacks a loss or a gradient norm.
    """
    rows: list[Row] = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    lacking = {field for row in rows for field in ("step", *FIELDS) if field not in row}
    if not rows or lacking:
        what = f"a step without {', '.join(sorted(lacking))}" if lacking else "no step"
        raise DattnError(f"{path} has {what}; nothing can be compared")
    return rows


def compare(
    base: dict[tuple[str, str], list[Row]], head: dict[tuple[str, str], list[Row]]
) -> list[tuple[str, str, int, str]]:
    """Rows of the table: stage, layout, steps, and `EQUAL` or what differs first."""
    return [
        (*name, len(rows), first_difference(rows, head[name]) or EQUAL)
        for name, rows in base.items()
    ]


def first_difference(base: Sequence[Row], head: Sequence[Row]) -> str | None:
    """The first step that differs, and by how much; None where every bit is equal."""
    for one, other in zip(base, head, strict=False):
        found = [
            _apart(field, one[field], other[field])
            for field in ("step", *FIELDS)
            if not _equal(one[field], other[field])
        ]
        if found:
            return f"step {one['step']}: {'; '.join(found)}"
    return None if len(base) == len(head) else f"{len(base)} and {len(head)} steps"


def _equal(one: float | None, other: float | None) -> bool:
    # JSON keeps the shortest text that gives the same bits; NaN equals NaN here, and 0.0 not -0.0.
    return repr(one) == repr(other)


def _apart(field: str, one: float | None, other: float | None) -> str:
    by = "" if one is None or other is None else f", {abs(other - one):.3g} apart"
    return f"{field} {one} and {other}{by}"


if __name__ == "__main__":
    sys.exit(main())
