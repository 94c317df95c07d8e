"""The data path: images a second, time waited for data, cost of an index, and how full packs are.

    python -m benchmarks.data_path                 # everything, about ten minutes on two cores
    python -m benchmarks.data_path images packing  # some parts: images, wait, index, packing

Every part prints a table and adds its numbers to data_path.json below --out, with a picture beside
it. `images` compares one process of this project's loader with Pillow and the Hugging Face
processor in two DataLoader workers, on the same files, in turns, so that other load on the machine
meets both. Exit status 1: a figure missed its bound (see BOUNDS).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.data_path_images import images
from benchmarks.data_path_index import index, wait
from benchmarks.data_path_packing import packing
from benchmarks.results import plt, provenance

PARTS = {"images": images, "wait": wait, "index": index, "packing": packing}
# Part, pattern of the figure's name, whether the bound is a least value, the bound.
BOUNDS = (
    ("images", "ratio", True, 2.5),
    ("wait", "waiting for data", False, 2.0),
    ("index", "start to first batch", False, 10.0),
    ("index", "added memory", False, 200.0),
    ("packing", "visual budget filled", True, 95.0),
    ("packing", "heaviest rank", False, 5.0),
)


def main() -> int:
    """Runs the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[])
    parser.add_argument("--images", type=int, default=96, help="JPEG files of 1 to 2 megapixels")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--lines", type=int, default=1_000_000, help="annotation lines of `index`")
    parser.add_argument("--steps", type=int, default=100, help="training steps of `wait`")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    output = chosen.out / "data_path.json"
    found: dict[str, Any] = json.loads(output.read_text()) if output.exists() else {}
    missed = []
    for name in chosen.parts or PARTS:
        load = f"{os.getloadavg()[0]:.1f}"
        with tempfile.TemporaryDirectory() as folder:
            figures = PARTS[name](chosen, Path(folder))
        found[name] = {**figures, "origin": provenance("cpu"), "load before": load}
        output.write_text(json.dumps(found, indent=1) + "\n")
        say(name, found[name])
        missed += misses(name, figures)
    draw(found, chosen.out / "data_path.png")
    sys.stdout.write("".join(f"missed: {line}\n" for line in missed))
    return 1 if missed else 0


def misses(part: str, figures: dict[str, Any]) -> list[str]:
    """Figures that are not within their bounds."""
    return [
        f"{name}: {value}, the bound is {bound}"
        for of, pattern, least, bound in BOUNDS
        if of == part
        for name, value in figures.items()
        if re.search(pattern, name) and (value < bound if least else value > bound)
    ]


def say(title: str, rows: dict[str, Any]) -> None:
    """A small table."""
    sys.stdout.write(f"\n{title}\n")
    for name, value in rows.items():
        sys.stdout.write(f"  {name:<52} {value}\n")
    sys.stdout.flush()


def draw(found: dict[str, Any], path: Path) -> None:
    """Images a second beside the peer's, and how full packs are, of the parts that were run."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.6), layout="constrained")
    left.set_visible("images" in found)
    right.set_visible("packing" in found)
    if "images" in found:
        kinds = ("square", "anyres")
        for shift, who, colour in (
            (-0.2, "this project, images/s", "#3b7dd8"),
            (0.2, "Pillow + Hugging Face, 2 workers, images/s", "#999999"),
        ):
            rates = [found["images"][f"{kind}: {who}"] for kind in kinds]
            bars = left.bar([x + shift for x in (0, 1)], rates, 0.4, color=colour, label=who)
            left.bar_label(bars, fontsize=8)
        left.set_xticks((0, 1), [f"{k}, {found['images'][f'{k}: ratio']} times" for k in kinds])
        left.legend(fontsize=8)
        left.set_title("1 to 2 megapixel JPEGs to 384-pixel tiles, 2 cores", fontsize=9)
    if "packing" in found:
        for kind in ("square", "anyres"):
            name = "{}, dp {}: visual budget filled, %"
            fills = [found["packing"][name.format(kind, dp)] for dp in (1, 2, 4)]
            right.plot(("dp 1", "dp 2", "dp 4"), fills, "o-", label=kind)
        right.axhline(95, color="#c0392b", linewidth=1)
        right.set_ylim(90, 100)
        right.legend(fontsize=8)
        right.set_title("visual budget filled, % (red: 95)", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    sys.stdout.write(f"picture {path}\n")


if __name__ == "__main__":
    sys.exit(main())
