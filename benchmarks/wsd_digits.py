"""A run made longer: 300 steps without a decay, then 100 with one, against 400 planned so.

    make quickstart                                  # leaves runs/quickstart/pretrain
    python -m benchmarks.wsd_digits                  # trains 800 steps in two processes
    python -m benchmarks.wsd_digits --write-docs     # and docs/training.md's lines

Stage 3 of the quickstart with `optim.schedule=wsd`. Losses, rates and gradient norms of all steps,
held-out losses, and every tensor of the last checkpoint must be equal bit for bit. A run that is
there already goes on where it stands. Exit status 1: something differs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import ROOT, provenance, write_section
from tools.checkpoint_convert.dist_checkpoint import DistCheckpoint

PLANNED = ("optim.schedule=wsd", "optim.warmup_ratio=null", "optim.warmup_steps=30")
FIELDS = ("loss", "lr", "grad_norm")


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains what is missing and compares; see the file's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", type=Path, default=Path("runs/quickstart/pretrain"))
    parser.add_argument("--out", type=Path, default=Path("runs/wsd_digits"))
    parser.add_argument("--stable", type=int, default=300, help="steps of the first run")
    parser.add_argument("--decay", type=int, default=100, help="steps that are added")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--write-docs", action="store_true")
    args = parser.parse_args(arguments)
    steps = args.stable + args.decay
    longer, planned = args.out / "longer", args.out / "planned"
    if not (longer / "checkpoints" / f"step_{steps:08d}").exists():
        train(args, longer, f"train.steps={args.stable}")
    for run_dir in (longer, planned):
        train(args, run_dir, f"train.steps={steps}", f"optim.decay_steps={args.decay}")
    problems, text = compare(longer, planned, args)
    sys.stdout.write(f"{text}\n")
    for problem in problems:
        sys.stderr.write(f"error: {problem}\n")
    if args.write_docs and not problems:
        write_section(ROOT / "docs" / "training.md", "wsd", f"{text}\n\n{provenance('cpu')}\n")
    return 1 if problems else 0


def train(args: argparse.Namespace, run_dir: Path, *settings: str) -> None:
    """One run of the command.

    Raises:
        SystemExit: it failed.
    """
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={args.processes}"]
    command = [sys.executable, "-m", *torchrun, "pretrain_dattn.py"]
    command += ["--config", "configs/digits_instruct.yaml", *PLANNED, *settings, "log.interval=1"]
    command += [f"log.run_dir={run_dir.resolve()}", f"checkpoint.init_from={args.base.resolve()}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")


def compare(longer: Path, planned: Path, args: argparse.Namespace) -> tuple[list[str], str]:
    """What differs, and the lines for the page."""
    problems = []
    for name in ("metrics", "validation"):
        ours, theirs = rows(longer, name), rows(planned, name)
        if ours != theirs:
            problems.append(f"{name}.jsonl of {longer} and {planned} differ")
    one, other = DistCheckpoint(longer), DistCheckpoint(planned)
    if one.shapes != other.shapes:
        problems.append("the checkpoints hold other tensors")
    else:
        differ = [k for k in one.shapes if not torch.equal(one.read_exact(k), other.read_exact(k))]
        problems += [f"{key} differs" for key in differ]
    held_out = {row["step"]: row["loss"] for row in rows(longer, "validation")}
    text = (
        f"On the digits, in {args.processes} processes: {args.stable} steps of "
        f"`configs/digits_instruct.yaml`, finished, then {args.decay} more with a decay. Losses, "
        f"rates and gradient norms of all {len(rows(longer, 'metrics'))} steps and all "
        f"{len(one.shapes)} tensors of the last checkpoint are those of a run that was planned so."
    )
    if args.stable in held_out:
        before, after = held_out[args.stable], held_out[args.stable + args.decay]
        text += f" The decay brings the held-out loss from {before:.3f} to {after:.3f}."
    return problems, text


def rows(run_dir: Path, name: str) -> list[dict[str, Any]]:
    """What a run measured, without times."""
    text = (run_dir / f"{name}.jsonl").read_text("utf-8")
    every = [json.loads(line) for line in text.splitlines()]
    return [{key: row[key] for key in ("step", *FIELDS) if key in row} for row in every]


if __name__ == "__main__":
    sys.exit(main())
