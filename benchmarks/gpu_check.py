"""Runs the GPU's tests and benchmarks, and writes what they say into docs/performance.md.

    make gpu-check                                  # on a machine with a GPU: everything there
    make gpu-check ARGS="--minutes 8"               # the short list, in order of worth
    make gpu-check ARGS="--tests none"              # benchmarks alone
    python -m benchmarks.gpu_check --device cpu     # small sizes, the page's CPU tables

It installs nothing: make takes .venv where that is complete, else the Python that is there. Every
item (`gpu_items`) is a process of its own with a limit of time; what fails is said, the rest goes
on. A benchmark's Markdown table goes between its two markers on the page, with machine, versions,
commit and command. The folder of results (`--out`) is small, and to be copied: a summary, JUnit
XML, JSON, a log of each item, pictures, and the page as it became. What is skipped for want of a
package is said first, and again at the end.
Exit status 1: an item failed or was stopped, or Transformer Engine is missing on a GPU and
--without-te was not given. 2: nothing could run: no GPU, or a package is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.gpu_items import TESTS, Item, arguments_of, items_for

if TYPE_CHECKING:
    from benchmarks.run_items import Result

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
NEEDED = ("torch", "megatron.core", "transformers", "matplotlib", "yaml", "psutil", "safetensors")


def missing_packages(tests: str) -> list[str]:
    """What an item needs and this Python lacks."""
    needed = [*NEEDED, *(["pytest"] if tests != "none" else [])]
    return [name for name in needed if not _is_there(name)]


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is missing
        return False


def no_gpu() -> str | None:
    """Why there is no GPU to check; None where there is one."""
    from dattn_mcore.parallel import gpus

    if gpus.gpu_available():
        return None
    return gpus.gpu_problem() or gpus.idle_gpus() or "PyTorch sees none on this machine"


def write_on_page(item: Item, result: Result, device: str, page: Path, folder: Path) -> None:
    """A benchmark's section: its table and where it came from, or why there is none."""
    from benchmarks.results import write_section

    section = f"{item.name}-{device}"
    shown = shlex.join(["python", *arguments_of(item, device, "docs")[2:]])
    origin = f"{origin_of(item, device, folder)}; `{shown}`"
    lines = [line for line in result.output.splitlines() if line.startswith("|")]
    if not lines or result.outcome == "stopped":
        write_section(page, section, f"{result.outcome} ({result.note})\n\n{origin}\n")
        return
    for file in (folder / "performance").glob(f"{section}.*"):
        target = page.parent / "performance" / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    picture = f"performance/{section}.png"
    if (page.parent / picture).exists():
        origin += f"\n\n![{item.name}]({picture})"
    missed = "" if result.outcome == "passed" else "\nIt missed its own bound (see the file).\n"
    write_section(page, section, "\n".join(lines) + f"\n\n{origin}\n{missed}")


def origin_of(item: Item, device: str, folder: Path) -> str:
    """What the benchmark says about machine and versions; it alone has touched the device."""
    from benchmarks.results import provenance

    written = folder / "performance" / f"{item.name}-{device}.json"
    if written.exists():
        return str(json.loads(written.read_text(encoding="utf-8"))["origin"])
    return provenance(device)


def say_what_is_skipped() -> bool:
    """One line for each package that is missing; False if Transformer Engine is.

    In a process of its own, because importing these packages can take memory of the device.
    """
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu_packages"]
    sys.stdout.flush()
    return subprocess.run(command, cwd=ROOT, check=False).returncode == 0


@contextlib.contextmanager
def compiling_ahead(folder: Path) -> Iterator[None]:
    """Inside, one process compiles the kernels of the short list (`warm_kernels`)."""
    from benchmarks.run_items import process_group

    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.warm_kernels"]
    with (folder / "warm-kernels.log").open("wb") as log, process_group(command, log, log):
        yield


def main(arguments: list[str] | None = None) -> int:
    """Runs everything; see the file's docstring."""
    parser = argparse.ArgumentParser(prog="gpu-check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "gpu"), default="gpu")
    parser.add_argument("--minutes", type=float, help="for all; takes the short list")
    parser.add_argument("--tests", choices=TESTS, help="default: all; short with --minutes")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu-check", help="results")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--only", nargs="+", help="names of items to run")
    parser.add_argument(
        "--without-te", action="store_true", help="succeed where Transformer Engine is missing"
    )
    args = parser.parse_args(arguments)
    on_gpu, short = args.device == "gpu", args.minutes is not None
    tests = args.tests or ("short" if short else "all")
    if missing := missing_packages(tests if on_gpu else "none"):
        parser.error(
            f"{sys.executable} lacks {', '.join(missing)}, and gpu-check installs nothing; install "
            "them there, or make .venv/installed-dev where there is a network"
        )
    if on_gpu and (problem := no_gpu()):
        parser.error(f"it needs a GPU: {problem}; --device cpu writes the page's CPU tables")
    return check(args, items_for(args.device, tests, short))


def check(args: argparse.Namespace, items: list[Item]) -> int:
    """Runs the items; see `main` for the arguments."""
    from benchmarks.run_items import run_all, summary_table

    if unknown := set(args.only or ()) - {item.name for item in items}:
        names = ", ".join(item.name for item in items)
        raise SystemExit(f"gpu-check: --only {' '.join(sorted(unknown))}: items are {names}")
    chosen = [item for item in items if args.only is None or item.name in args.only]
    on_gpu, folder = args.device == "gpu", args.out.absolute()
    folder.mkdir(parents=True, exist_ok=True)

    def finished(item: Item, result: Result) -> None:
        sys.stdout.write(
            f"\n{item.name}: {result.outcome} after {result.seconds:.0f} s {result.note}\n"
            f"{result.output[-4000:]}"
        )
        sys.stdout.flush()
        if item.kind == "benchmark" and result.outcome != "no time":
            write_on_page(item, result, args.device, args.page, folder)

    with compiling_ahead(folder) if on_gpu else contextlib.nullcontext():
        if on_gpu:
            say_what_is_skipped()
        results = run_all(
            items=chosen,
            arguments_of=lambda item: arguments_of(item, args.device, str(folder)),
            folder=folder,
            minutes=args.minutes,
            finished=finished,
        )
    table = summary_table(results)
    if on_gpu:
        write_summary_on_page(args, chosen, table, folder)
    shutil.copyfile(args.page, folder / args.page.name)
    sys.stdout.write(f"\n{table}\nresults in {folder}\n")
    good = all(one.outcome in ("passed", "no time") for one in results)
    if on_gpu and not say_what_is_skipped():
        good &= args.without_te
    return 0 if good else 1


def write_summary_on_page(
    args: argparse.Namespace, items: list[Item], table: str, folder: Path
) -> None:
    """What ran, what failed and what did not start, in the page's first section."""
    from benchmarks.results import provenance, write_section

    origins = [
        origin_of(item, args.device, folder)
        for item in items
        if (folder / "performance" / f"{item.name}-{args.device}.json").exists()
    ]
    words = [f"--minutes {args.minutes:g}"] if args.minutes is not None else []
    words += [f"--tests {args.tests}"] if args.tests else []
    words += [f"--only {' '.join(args.only)}"] if args.only else []
    command = "make gpu-check" + (f' ARGS="{" ".join(words)}"' if words else "")
    origin = origins[0] if origins else provenance(args.device)
    text = f"What `{command}` last ran:\n\n{table}\n{origin}\n"
    write_section(args.page, "gpu-check", text)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what it started ends too
    sys.exit(main())
