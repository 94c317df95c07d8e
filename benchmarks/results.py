"""What a benchmark hands over: a table, a picture, a JSON file; and sections of a page."""

from __future__ import annotations

import argparse
import json
import os
import platform as machine
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib

from dattn_mcore.parallel import platform

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator

ROOT = Path(__file__).resolve().parents[1]
LOAD = os.getloadavg()[0]  # of the last minute before the benchmark
PACKAGES = ("torch", "megatron-core", "transformers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every benchmark takes."""
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/benchmarks"), help="folder for picture and JSON"
    )


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table as the documentation has them."""
    columns = list(header)
    lines = [columns, ["---"] * len(columns), *(list(map(str, row)) for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def provenance(device: str) -> str:
    """One line: machine, versions, commit."""
    where = platform.device_name() if device == "gpu" else _cpu_name()
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return f"{where}; Python {machine.python_version()}, {packages}; commit {commit()}"


def commit(clone: Path = ROOT) -> str:
    """The commit that runs, and whether files of it were changed."""
    git = ["git", "-C", str(clone)]
    found = _output([*git, "rev-parse", "--short", "HEAD"]) or "unknown"
    if _output([*git, "status", "--porcelain", "--untracked-files=no", "--", ":!docs"]):
        found += " and changes"
    return found


def _output(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    processor = names[0] if names else machine.machine()
    return f"{processor}, {len(names)} cores, {threads} threads, load {LOAD:.1f} before"


def hand_over(
    name: str,
    args: argparse.Namespace,
    table: str,
    rows: list[dict[str, Any]],
    draw: Callable[[Any], None],
) -> None:
    """Prints the table and where it came from, and writes picture and JSON.

    Args:
        name: of the benchmark; with the device it names the files.
        args: has device and out.
        table: Markdown.
        rows: the same as data.
        draw: draws into matplotlib axes.
    """
    title, origin = f"{name}-{args.device}", provenance(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(7.2, 4.0), layout="constrained")
    draw(axes)
    picture = args.out / f"{title}.png"
    figure.savefig(picture, dpi=110)
    plt.close(figure)
    data = {"origin": origin, "rows": rows}
    (args.out / f"{title}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{table}\n{origin}\npicture {picture}\n")


def number_ticks(axes: Any, values: Sequence[int]) -> None:
    """Ticks of the horizontal axis at these numbers; both axes' written out, not as powers."""
    axes.set_xticks(values, [f"{value:,}" for value in values])
    axes.tick_params(which="minor", bottom=False, labelbottom=False, labelleft=False)
    if axes.get_yscale() == "log":
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")


def write_section(page: Path, name: str, text: str) -> None:
    """Replaces what stands between `<!-- begin NAME -->` and `<!-- end NAME -->`."""
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"{page} has no section {name}: write {begin.strip()} and {end}")
    page.write_text(f"{before}{begin}{text}{end}{after}", encoding="utf-8")
