"""A campaign of faults: what the trainer and its tools come through, and what not.

    python -m benchmarks.faults                          # all of it, some minutes on two cores
    python -m benchmarks.faults --kinds kill disk        # some kinds
    python -m benchmarks.faults --seed 7                 # other moments, bits and damages

Kinds: kills at random moments of a save, a disk that fills up in one, bits flipped and files cut in
a checkpoint, a rank that stands still, and hostile images, annotations, configurations and model
folders. To come through means: the run goes on bit for bit as if nothing had happened, or one line
says what is wrong; never a traceback, a hang, or a wrong number.

Prints survived of tried by kind, and writes runs/faults/report.json. The folder of each case that
did not come through stays beside it. Exit status 1: something was not survived.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
import sys
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.fault_cases import flips, images, ranks, saves, texts
from benchmarks.fault_cases.case import STEPS, Case, Workshop, make_workshop
from benchmarks.results import markdown_table, provenance
from dattn_mcore.units import duration
from tests.ranks import forks

KINDS = (
    "kill",
    "disk",
    "rank",
    "flip",
    "file",
    "image",
    "annotations",
    "configuration",
    "export",
)
SECONDS_APART = 60.0  # that one case in a shared process may take
SECONDS_TO_START = 120.0


@dataclass(frozen=True)
class Outcome:
    """A case, and what happened: None where it was survived."""

    case: Case
    problem: str | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the campaign; see the file's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn")
    parser.add_argument("--sample", type=int, help="so many cases only, some of each kind")
    parser.add_argument("--out", type=Path, default=Path("runs/faults"))
    args = parser.parse_args(arguments)
    started = time.monotonic()
    workshop = make_workshop(args.out.resolve() / "workshop")
    chosen = [case for case in all_cases(workshop, args.seed) if case.kind in args.kinds]
    if args.sample is not None:
        chosen = sample(chosen, args.sample, args.seed)
    outcomes = list(run(chosen, workshop, args.out.resolve() / "cases"))
    rows = []
    for kind in dict.fromkeys(outcome.case.kind for outcome in outcomes):
        problems = [o.problem for o in outcomes if o.case.kind == kind]
        rows.append((kind, problems.count(None), len(problems)))
    rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    lost = [outcome for outcome in outcomes if outcome.problem is not None]
    report = {
        "seed": args.seed,
        "rows": rows,
        "not survived": [[o.case.kind, o.case.name, o.problem] for o in lost],
    }
    (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    sys.stdout.write(f"\n{markdown_table(('fault', 'survived', 'of'), rows)}")
    sys.stdout.write(f"{duration(time.monotonic() - started)}; {provenance('cpu')}\n")
    for outcome in lost:
        sys.stderr.write(
            f"error: not survived: {outcome.case.kind}, {outcome.case.name}: {outcome.problem}\n"
        )
    return 1 if lost else 0


def all_cases(workshop: Workshop, seed: int) -> list[Case]:
    """The whole campaign; the same seed gives the same cases."""
    newest = workshop.whole / "checkpoints" / f"step_{STEPS:08d}"
    files = {
        str(path.relative_to(newest)): path.stat().st_size
        for path in sorted(newest.rglob("*"))
        if path.is_file()
    }
    generator = random.Random(seed)
    return [
        *saves.cases(generator),
        *ranks.cases(generator),
        *flips.cases(generator, files),
        *images.cases(generator),
        *texts.cases(generator),
    ]


def sample(cases: Sequence[Case], count: int, seed: int) -> list[Case]:
    """As many cases, taken from the kinds in turn, in the order that they had."""
    generator = random.Random(seed)
    by_kind = {kind: [case for case in cases if case.kind == kind] for kind in KINDS}
    for of_kind in by_kind.values():
        generator.shuffle(of_kind)
    chosen: list[Case] = []
    while len(chosen) < count and any(by_kind.values()):
        for of_kind in by_kind.values():
            if of_kind and len(chosen) < count:
                chosen.append(of_kind.pop())
    return [case for case in cases if case in chosen]


def run(cases: Sequence[Case], workshop: Workshop, folder: Path) -> Iterable[Outcome]:
    """Runs cases one after the other and shows how far it is.

    Args:
        cases: to run.
        workshop: what they share.
        folder: for each case's own folder; removed where the case was survived.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    started, lost = time.monotonic(), 0
    with Bench() as bench:
        for number, case in enumerate(cases):
            own = folder / f"{number:04d}"
            own.mkdir()
            problem = bench.run(case, own, workshop) if case.apart else attempt(case, own, workshop)
            lost += problem is not None
            if problem is None:
                shutil.rmtree(own)
            yield Outcome(case, problem)
            done, taken = number + 1, time.monotonic() - started
            if done == len(cases) or not case.apart or done % 50 == 0:
                sys.stdout.write(
                    f"{done} of {len(cases)} ({case.kind}), {lost} not survived, "
                    f"ETA {duration(taken / done * (len(cases) - done))}\n"
                )
                sys.stdout.flush()


def attempt(case: Case, folder: Path, workshop: Workshop) -> str | None:
    """Runs a case; whatever it raises is what happened."""
    try:
        return case.run(folder, workshop)
    except Exception as error:  # noqa: BLE001 (a defect of any kind is what is looked for)
        (folder / "traceback.txt").write_text(traceback.format_exc(), "utf-8")
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


class Bench:
    """A process for cases that touch no other process; made anew when one of them ends it."""

    def __init__(self) -> None:
        self._process: Any = None
        self._connection: Any = None

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def run(self, case: Case, folder: Path, workshop: Workshop) -> str | None:
        """Runs a case there; a crash or a hang is what happened."""
        limit = SECONDS_APART
        if self._process is None:
            self._connection, theirs = multiprocessing.Pipe()
            self._process = forks().Process(target=_serve, args=(theirs,))
            self._process.start()
            theirs.close()
            limit += SECONDS_TO_START
        try:
            self._connection.send((case, folder, workshop))
            if self._connection.poll(limit):
                outcome: str | None = self._connection.recv()
                return outcome
            problem = f"it took more than {limit:.0f} s"
        except (EOFError, BrokenPipeError):
            self._process.join(10)
            problem = f"the process ended with status {self._process.exitcode}"
        self._end()
        return problem

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None


def _serve(connection: Any) -> None:
    """Runs the cases that come."""
    while True:
        try:
            case, folder, workshop = connection.recv()
        except EOFError:
            return
        connection.send(attempt(case, folder, workshop))


if __name__ == "__main__":
    sys.exit(main())
