"""Bytes that context parallelism sends a layer, counted: D-Attn, and ring attention over its rows.

    python -m benchmarks.context_traffic
    python -m benchmarks.context_traffic --write-docs        # and docs/context-parallel.md's tables

Processes of this machine's CPU share a pack of V visual rows before T text rows. Each one's calls
are counted (`benchmarks.context_ranks`) in D-Attn's attention of one layer, in ring attention over
the same rows (`benchmarks.ring_attention`), and in a training step of a small model, where the
exchange before the first layer and the reduction of gradients stand apart. Beside them stands the
closed form of Ulysses; and closed forms at the sizes of real models. Exit status 1: the count of
a layer, or of all layers of the step, is not its closed form, or the planner's, to the byte; or the
system says that something else was written.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
from typing import Any

from dattn_mcore.parallel import entry

entry.prepare_imports("cpu")

from benchmarks.context_checks import planned_bytes, problems
from benchmarks.context_formulas import Shape, dattn_bytes, ring_bytes, ulysses_bytes
from benchmarks.context_ranks import SIDE, all_of
from benchmarks.cpu_ranks import on_ranks
from benchmarks.results import (
    ROOT,
    add_arguments,
    hand_over,
    markdown_table,
    number_ticks,
    provenance,
    write_section,
)
from benchmarks.steps import sized_config
from dattn_mcore.console import say

PAGE = ROOT / "docs" / "context-parallel.md"
REAL = {"Mistral 7B": "mistral", "Gemma 2 9B": "gemma"}
REAL_VISUAL, REAL_TEXT, REAL_RANKS = (1_000, 10_000, 100_000, 1_000_000), 512, 8
MIB = 2**20


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each group size and number of visual rows; of the rank that sends most."""
    rows = []
    shapes = [
        Shape(visual, args.text, args.heads, args.groups, args.head_dim) for visual in args.visual
    ]
    for ranks in args.ranks:
        started = time.monotonic()
        by_rank = on_ranks(all_of, ranks, shapes=shapes, layers=args.layers)
        say(f"cp {ranks}: {time.monotonic() - started:.0f} s")
        for shape, found in zip(shapes, zip(*by_rank, strict=True), strict=True):
            attention, ring, step = zip(*found, strict=True)
            row: dict[str, Any] = {
                "ranks": ranks,
                "visual": shape.visual,
                "attention": [vars(one) for one in attention],
                "ring": [vars(one) for one in ring],
                "step": [vars(one) for one in step],
                "formula": dattn_bytes(shape, ranks),
                "ring_formula": ring_bytes(shape, ranks),
                "ulysses_formula": ulysses_bytes(shape, ranks),
                "planned": planned_bytes(shape, ranks, args.layers),
            }
            rows.append({**row, "problems": problems(row, args.layers)})
    return rows


def _both(row: dict[str, Any], name: str) -> int:
    """Forward and backward, of the rank that sends most."""
    return max(one["forward"] + one["backward"] for one in row[name])


def _most(row: dict[str, Any], name: str) -> int:
    return max(one[name] for one in row["step"])


def counted_table(rows: list[dict[str, Any]]) -> str:
    """Bytes of a layer beside those of a step."""

    def cells(row: dict[str, Any]) -> list[str]:
        ours, ring = _both(row, "attention"), _both(row, "ring")
        written = max(one["written"] or 0 for one in row["attention"])
        return [
            str(row["ranks"]),
            *(
                f"{number:,}"
                for number in (
                    row["visual"],
                    ours,
                    sum(row["formula"]),
                    written,
                    ring,
                    sum(row["ulysses_formula"]),
                )
            ),
            f"{ring / ours:.1f}",
            f"{_most(row, 'exchange'):,}",
            f"{_most(row, 'gradients'):,}",
        ]

    header = (
        "cp",
        "V",
        "D-Attn, a layer: counted",
        "closed form",
        "written to sockets",
        "ring, a layer: counted",
        "Ulysses, closed form",
        "ring / D-Attn",
        "before the first layer, a step",
        "gradients and weights, a step",
    )
    return markdown_table(header, map(cells, rows))


def real_table() -> str:
    """Closed forms at the sizes of real models, in bf16."""
    lines = []
    for name, size in REAL.items():
        llm = sized_config(size, "gpu", None).model.llm
        for visual in REAL_VISUAL:
            shape = Shape(
                visual,
                REAL_TEXT,
                llm.num_attention_heads,
                llm.num_query_groups,
                llm.head_dim,
                number_bytes=2,
            )
            ours, ring, ulysses = (
                sum(form(shape, REAL_RANKS)) / MIB
                for form in (dattn_bytes, ring_bytes, ulysses_bytes)
            )
            lines.append(
                [name, f"{visual:,}", f"{ours:.1f}", f"{ring:,.1f}", f"{ulysses:,.1f}"]
                + [f"{ring / ours:,.1f}"]
            )
    header = ("model", "V", "D-Attn, MiB", "ring, MiB", "Ulysses, MiB", "ring / D-Attn")
    return markdown_table(header, lines)


def draw(axes: Any, rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Bytes over visual rows: points are counted, the dotted line is a closed form."""
    for place, ranks in enumerate(args.ranks):
        own = [row for row in rows if row["ranks"] == ranks]
        visual = [row["visual"] for row in own]
        look = {"color": f"C{place}"}
        for name, style, label in (("attention", "o-", "D-Attn"), ("ring", "s--", "ring")):
            values = [_both(row, name) / MIB for row in own]
            axes.plot(visual, values, style, label=f"{label}, cp {ranks}", **look)
        forms = [sum(row["ulysses_formula"]) / MIB for row in own]
        axes.plot(visual, forms, ":", label=f"Ulysses, cp {ranks} (closed form)", **look)
    axes.set(xscale="log", yscale="log", xlabel="visual rows", ylabel="MiB sent by a rank")
    axes.set_title(f"attention of one layer, forward and backward, {args.text} text rows")
    number_ticks(axes, args.visual)
    axes.legend(fontsize="small")


def _refusal(args: argparse.Namespace) -> str | None:
    """Why these sizes cannot be measured; None if they can."""
    if args.device != "cpu":
        return "--device gpu: bytes are counted on processes of a CPU; leave it out"
    for visual in args.visual:
        if visual % SIDE**2:
            return f"--visual {visual}: must be a multiple of {SIDE**2}, the rows of a tile"
    for ranks in args.ranks:
        pieces = math.lcm(16, 2 * ranks)  # no rank has padding
        if args.text % pieces:
            return f"--text {args.text}: must be a multiple of {pieces} for --ranks {ranks}"
        for visual in args.visual:
            if (visual + args.text) % (2 * ranks):
                return (
                    f"--visual {visual} and --text {args.text}: together they must be a multiple "
                    f"of {2 * ranks}, two pieces for each of --ranks {ranks}"
                )
    return None


def main(arguments: list[str] | None = None) -> int:
    """Measures and hands over; see the file's docstring."""
    given = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="context parallel")
    parser.add_argument(
        "--visual",
        type=int,
        nargs="+",
        default=[1_000, 10_000, 100_000],
        help=f"visual rows, multiples of a tile's {SIDE * SIDE}",
    )
    parser.add_argument("--text", type=int, default=512)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--groups", type=int, default=1)
    parser.add_argument("--head-dim", type=int, default=16)
    parser.add_argument("--layers", type=int, default=2, help="of the model that makes a step")
    parser.add_argument("--write-docs", action="store_true", help=f"write {PAGE.name}'s tables")
    args = parser.parse_args(given)
    if refusal := _refusal(args):
        parser.error(refusal)
    if args.write_docs:
        args.out = PAGE.parent / "performance"
    rows = measure(args)
    table = counted_table(rows)
    hand_over("context-traffic", args, table, rows, lambda axes: draw(axes, rows, args))
    if args.write_docs:
        command = shlex.join(["python", "-m", "benchmarks.context_traffic", *given])
        picture = "![bytes of a layer's attention](performance/context-traffic-cpu.png)"
        origin = f"{provenance(args.device)}; `{command}`"
        write_section(PAGE, "context-traffic", f"{table}\n{origin}\n\n{picture}\n")
        write_section(PAGE, "context-traffic-real", real_table())
    wrong = [
        f"cp {row['ranks']}, V = {row['visual']}: {p}" for row in rows for p in row["problems"]
    ]
    for line in wrong:
        say(line)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
