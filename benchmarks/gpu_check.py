"""Runs the GPU's tests and all benchmarks, and writes their tables into docs/performance.md.

    make gpu-check                                  # on a machine with a GPU: everything there
    python -m benchmarks.gpu_check --device cpu     # small sizes, the page's CPU tables

Every benchmark is a process of its own; its Markdown table goes between its two markers on the
page, with machine, versions, commit and command; pictures and JSON files go into
docs/performance. What fails is said on the page too, the rest goes on.
What is skipped for want of a package is said first, and again at the end.
Exit status 1: a test failed, or a benchmark did, or one missed its own bound, or Transformer Engine
is missing on a GPU and --without-te was not given.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

from benchmarks.results import ROOT, provenance, write_section

PAGE = ROOT / "docs" / "performance.md"
PYTHON = [sys.executable, "-W", "ignore", "-m"]
# On one GPU of 80 to 141 GB: D-Attn, baseline and LLaVA stand side by side in the step.
STEP = ["benchmarks.training_step", "--layers", "4", "--text", "512", "--visual"]
# As many layers as fit, in bf16 and FP8, next to the planner's word.
PLANNED = ["benchmarks.planned_step", "--text", "512", "--precision", "bf16"]
PLANNED += ["tensorwise", "blockwise", "delayed"]
MEMORY = ["benchmarks.peak_memory", "--layers", "16", "--text", "512", "--chunk", "2048"]
OVER = ["576", "2304", "4608", "9216", "18432", "36864"]
GPU = {
    "attention-backends": ["benchmarks.attention_backends", "--repeats", "20"],
    "training-step-mistral": [*STEP, "576", "2880", "8064", "16128", "32256", "--size", "mistral"],
    "training-step-gemma": [*STEP, "576", "2880", "8064", "--size", "gemma"],
    "planned-step-mistral": [*PLANNED, "--visual", *OVER, "--size", "mistral"],
    "planned-step-gemma": [*PLANNED, "--visual", *OVER, "--size", "gemma"],
    "peak-memory-mistral": [*MEMORY, "--size", "mistral"],
    "peak-memory-gemma": [*MEMORY, "--size", "gemma"],
}
CPU = {
    "attention-backends": ["benchmarks.attention_backends"],
    "training-step-small": ["benchmarks.training_step", "--visual", "576", "1152", "2304", "4608"],
    "flops": ["benchmarks.count_flops"],
    "peak-memory-tiny": ["benchmarks.peak_memory"],
}


def commands(device: str) -> dict[str, list[str]]:
    """Name of the section on the page, without the device, and command of every benchmark."""
    plan = GPU if device == "gpu" else CPU
    options = ["--device", device, "--out", "docs/performance"]
    return {name: [*PYTHON, *command, *options] for name, command in plan.items()}


def run_benchmark(name: str, command: list[str], device: str, page: Path) -> bool:
    """Runs one benchmark and writes its section; False if it failed or missed its bound."""
    shown = shlex.join(["python", *command[1:]]).replace(" -W ignore", "")
    sys.stdout.write(f"\n{shown}\n")
    sys.stdout.flush()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    table = "".join(f"{line}\n" for line in done.stdout.splitlines() if line.startswith("|"))
    sys.stdout.write(done.stdout)
    origin = f"{_origin(page, name, device, done.returncode)}; `{shown}`"
    picture = f"performance/{name}-{device}.png"
    if (page.parent / picture).exists():
        origin += f"\n\n![{name}]({picture})"
    if table:
        note = "\nIt missed its own bound (see the file).\n" if done.returncode else ""
        write_section(page, f"{name}-{device}", f"{table}\n{origin}\n{note}")
    else:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        problem = f"failed (exit status {done.returncode}): {last}"
        sys.stdout.write(f"{problem}\n")
        write_section(page, f"{name}-{device}", f"{problem}\n\n{origin}\n")
    return done.returncode == 0


def _origin(page: Path, name: str, device: str, status: int) -> str:
    """What the benchmark says about machine and versions; it alone has touched the device."""
    written = page.parent / f"performance/{name}-{device}.json"
    if status == 0 and written.exists():
        return json.loads(written.read_text(encoding="utf-8"))["origin"]
    return provenance(device)


def _say_what_is_skipped() -> bool:
    """One line for each package that is missing; False if Transformer Engine is.

    In a process of its own, because importing these packages can take memory of the device.
    """
    sys.stdout.flush()
    return (
        subprocess.run([*PYTHON, "benchmarks.gpu_packages"], cwd=ROOT, check=False).returncode == 0
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs everything; see the file's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "gpu"), default="gpu")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--only", nargs="+", default=None, help="names of benchmarks to run")
    parser.add_argument(
        "--without-te", action="store_true", help="succeed where Transformer Engine is missing"
    )
    args = parser.parse_args(arguments)
    good = True
    if args.device == "gpu":
        _say_what_is_skipped()  # hours before the end
        tests = subprocess.run([*PYTHON, "pytest", "-q", "-rs", "tests/gpu"], cwd=ROOT, check=False)
        good = tests.returncode == 0
    for name, command in commands(args.device).items():
        if args.only is None or name in args.only:
            good &= run_benchmark(name, command, args.device, args.page)
    if args.device == "gpu" and not _say_what_is_skipped():
        good &= args.without_te
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
