"""Does the quickstart end well whatever the seed?

    python -m benchmarks.quickstart_seeds                       # ten seeds, then three blind
    python -m benchmarks.quickstart_seeds --draw 3              # and three seeds drawn now
    python -m benchmarks.quickstart_seeds --write-docs          # and docs/quickstart.md's table

Runs the command of `make quickstart` once a seed and keeps each result as soon as it is there, so
that a run which was stopped goes on where it was. Seeds drawn once are kept too, and so are the
measurements of every run's stages (runs/quickstart_seeds/metrics). Results of other
settings are not mixed: they are kept by a digest of the settings, of the data and of the versions.
Exit status 1: a seed below the least accuracy, a mean below 95 %, or a blind run above its bound.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

from benchmarks.results import (
    PACKAGES,
    ROOT,
    commit,
    markdown_table,
    provenance,
    write_section,
)
from dattn_mcore.quickstart.expectation import BLIND_SETTING, LEAST, MOST_BLIND
from dattn_mcore.quickstart.steps import STAGES
from dattn_mcore.units import duration

SEEDS = (0, 1, 2, 5, 7, 42, 99, 123, 1234, 2024)
BLIND_SEEDS = (0, 7, 1234)
LEAST_MEAN = 0.95
_WHAT_COUNTS = (
    "configs/digits_*.yaml",
    "dattn_mcore/data/digits*.py",
    "dattn_mcore/architectures/sizes.py",
    "dattn_mcore/config/schema.py",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what is missing, prints the table; see the file's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--blind-seeds", type=int, nargs="*", default=list(BLIND_SEEDS))
    parser.add_argument("--draw", type=int, default=0, help="further seeds, drawn at random once")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart_seeds"))
    parser.add_argument(
        "--write-docs", action="store_true", help="write docs/quickstart.md's table"
    )
    args = parser.parse_args(arguments)
    results = Results(args.out / f"results-{settings_digest()}.json")
    drawn = results.draw(args.draw, taken=args.seeds)
    runs = [(seed, False) for seed in [*args.seeds, *drawn]]
    runs += [(seed, True) for seed in args.blind_seeds]
    run_missing(runs, results, args.out)
    rows = [results.get(seed, blind) for seed, blind in runs]
    table, problems = summary(rows, drawn)
    commits = ", ".join(dict.fromkeys(str(row.get("commit", "unknown")) for row in rows))
    origin = f"{provenance('cpu')}; runs of {commits}"
    sys.stdout.write(f"\n{table}\n{origin}\n{results.path}\n")
    if args.write_docs:
        write_section(ROOT / "docs" / "quickstart.md", "seeds", f"{table}\n{origin}\n")
    for problem in problems:
        sys.stderr.write(f"error: {problem}\n")
    return 1 if problems else 0


class Results:
    """Accuracies that are known, kept in a file after every run.

    Args:
        path: the file; made when there is something to keep.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        kept = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        self.runs: dict[str, dict[str, Any]] = kept.get("runs", {})
        self.drawn: list[int] = kept.get("drawn", [])

    def get(self, seed: int, blind: bool) -> dict[str, Any]:
        """A run's result; KeyError where it has not been run."""
        return self.runs[self._key(seed, blind)]

    def has(self, seed: int, blind: bool) -> bool:
        """Whether a run is kept."""
        return self._key(seed, blind) in self.runs

    def put(self, row: dict[str, Any]) -> None:
        """Keeps a run."""
        self.runs[self._key(row["seed"], row["blind"])] = row
        self._write()

    def draw(self, count: int, taken: Sequence[int]) -> list[int]:
        """As many random seeds; those drawn before come first, so that none is drawn away."""
        while len(self.drawn) < count:
            seed = secrets.randbelow(100_000)
            if seed not in taken and seed not in self.drawn:
                self.drawn.append(seed)
                self._write()
        return self.drawn[:count]

    def _key(self, seed: int, blind: bool) -> str:
        return f"{'blind' if blind else 'seed'} {seed}"

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".new")
        new.write_text(
            json.dumps({"drawn": self.drawn, "runs": self.runs}, indent=1) + "\n", "utf-8"
        )
        new.replace(self.path)


def settings_digest() -> str:
    """Of everything that decides what is trained; other settings' results are another file."""
    versions = [f"{name} {version(name)}" for name in PACKAGES]
    digest = hashlib.sha256(f"{python_version()} {versions}".encode())
    for pattern in _WHAT_COUNTS:
        for path in sorted(ROOT.glob(pattern)):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def run_missing(runs: Sequence[tuple[int, bool]], results: Results, out: Path) -> None:
    """Runs the quickstart for what is not known yet, and says how long the rest will take."""
    missing = [run for run in runs if not results.has(*run)]
    if len(missing) < len(runs):
        sys.stdout.write(f"{len(runs) - len(missing)} of {len(runs)} runs are known already\n")
    started = time.monotonic()
    for number, (seed, blind) in enumerate(missing):
        row = run_quickstart(seed, blind, out / "run")
        results.put(row)
        taken = (time.monotonic() - started) / (number + 1)
        rest = duration(taken * (len(missing) - number - 1))
        sys.stdout.write(
            f"{'blind, ' if blind else ''}seed {seed}: {row['correct']}/{row['total']} "
            f"({row['correct'] / row['total']:.1%}) in {row['seconds']:.0f} s; {number + 1} of "
            f"{len(missing)}, ETA {rest}\n"
        )
        sys.stdout.flush()


def run_quickstart(seed: int, blind: bool, folder: Path) -> dict[str, Any]:
    """One run in a process of its own.

    Raises:
        SystemExit: it ended without a score.
    """
    command = [sys.executable, "-m", "dattn_mcore.quickstart", "--run-dir", str(folder.resolve())]
    command += [f"train.seed={seed}", *([f"{BLIND_SETTING}=false"] if blind else [])]
    score = folder / "score.json"
    score.unlink(missing_ok=True)  # an earlier run's, were this one to end before it has its own
    started = time.monotonic()
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    # Status 1 with a score is an accuracy out of bounds, which is a result here.
    if process.returncode not in (0, 1) or not score.is_file():
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{process.stderr}")
    overall = json.loads(score.read_text("utf-8"))["overall"]
    kept = folder.parent / "metrics" / f"{'blind' if blind else 'seed'}_{seed}"
    kept.mkdir(parents=True, exist_ok=True)
    for stage in STAGES:  # the folder is the next run's; where a run lost its way is seen here
        shutil.copy(folder / stage / "metrics.jsonl", kept / f"{stage}.jsonl")
    return {
        "seed": seed,
        "blind": blind,
        "correct": overall["correct"],
        "total": overall["total"],
        "status": process.returncode,
        "seconds": round(time.monotonic() - started, 1),
        "commit": commit(),
    }


def summary(rows: Sequence[dict[str, Any]], drawn: Sequence[int]) -> tuple[str, list[str]]:
    """The table, and what is out of bounds."""
    lines, seeing, problems = [], [], []
    for row in rows:
        name = str(row["seed"]) + (", drawn" if row["seed"] in drawn else "")
        accuracy = row["correct"] / row["total"]
        if row["blind"]:
            name += ", blind"
            if accuracy > MOST_BLIND:
                problems.append(f"seed {name} reaches {accuracy:.1%}, above {MOST_BLIND:.0%}")
        else:
            seeing.append(accuracy)
            if accuracy < LEAST:
                problems.append(f"seed {name} reaches {accuracy:.1%}, below {LEAST:.0%}")
        seconds = f"{row['seconds']:.0f}"
        lines.append((name, row["correct"], row["total"], f"{accuracy:.1%}", seconds))
    table = markdown_table(("seed", "right", "of", "accuracy", "seconds"), lines)
    if seeing:
        mean = sum(seeing) / len(seeing)
        table += f"\nMean of {len(seeing)} seeds {mean:.1%}, lowest {min(seeing):.1%}.\n"
        if mean < LEAST_MEAN:
            problems.append(f"the mean is {mean:.1%}, below {LEAST_MEAN:.0%}")
    return table, problems


if __name__ == "__main__":
    sys.exit(main())
