"""A picture of one step of a trace that `profile.start` wrote.

    python -m benchmarks.trace_picture runs/x/profile/steps_4-6_rank0.json.gz --step 5

Draws the operations of the step's threads over time, those that take longest in colours. It is no
replacement for https://ui.perfetto.dev, which opens the same file.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import plt

Event = dict[str, Any]
COLOURS = ("#3b6fb6", "#d97a1e", "#1a7f4b", "#c2362b", "#7a5ba6", "#8a9bb0", "#b8860b", "#4aa3a2")
OTHER = "#d1d5db"


def main(arguments: Sequence[str] | None = None) -> int:
    """Reads the trace and writes the picture."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trace_picture", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("trace", type=Path, help="of a rank, .json.gz")
    parser.add_argument("--step", type=int, required=True, help="one of its window")
    parser.add_argument("--out", type=Path, default=Path("trace.png"))
    args = parser.parse_args(arguments)
    with gzip.open(args.trace, "rt", encoding="utf-8") as file:
        events: list[Event] = json.load(file)["traceEvents"]
    found = [event for event in events if event.get("name") == f"step {args.step}"]
    if not found:
        sys.stderr.write(f"error: {args.trace} has no step {args.step}\n")
        return 2
    draw(args.trace.name, found[0], operations(events, found[0]), args.out)
    sys.stdout.write(f"picture {args.out}\n")
    return 0


def operations(events: Sequence[Event], step: Event) -> list[Event]:
    """Operations within a step, outermost first."""
    begin, end = step["ts"], step["ts"] + step["dur"]
    return sorted(
        (event for event in events if event.get("cat") == "cpu_op" and begin <= event["ts"] < end),
        key=lambda event: (event["tid"], event["ts"], -event["dur"]),
    )


def own_times(found: Sequence[Event]) -> dict[str, float]:
    """Microseconds of each operation by its name, without those that it calls."""
    times: dict[str, float] = defaultdict(float)
    open_ones: list[Event] = []
    for event in found:
        while open_ones and (
            open_ones[-1]["tid"] != event["tid"]
            or open_ones[-1]["ts"] + open_ones[-1]["dur"] <= event["ts"]
        ):
            open_ones.pop()
        if open_ones:
            times[open_ones[-1]["name"]] -= event["dur"]
        times[event["name"]] += event["dur"]
        open_ones.append(event)
    return dict(times)


def depths(found: Sequence[Event]) -> list[int]:
    """How many operations each one stands in."""
    result, ends, thread = [], [], None
    for event in found:
        if event["tid"] != thread:
            ends, thread = [], event["tid"]
        while ends and ends[-1] <= event["ts"]:
            ends.pop()
        result.append(len(ends))
        ends.append(event["ts"] + event["dur"])
    return result


def draw(title: str, step: Event, found: Sequence[Event], out: Path) -> None:
    """Threads above each other, and in each the calls above what they call."""
    times = own_times(found)
    longest = sorted(times, key=lambda name: -times[name])[: len(COLOURS)]
    colours = dict(zip(longest, COLOURS, strict=False))
    busy = {event["tid"]: 0.0 for event in found}
    for event in found:
        busy[event["tid"]] = max(busy[event["tid"]], event["dur"])
    threads = [thread for thread, longest_one in busy.items() if longest_one > step["dur"] / 1e3]
    figure, axes = plt.subplots(figsize=(11, 4.2), layout="constrained")
    bars: dict[tuple[float, str], list[tuple[float, float]]] = defaultdict(list)
    levels, base, ticks = depths(found), 0, []
    for thread in threads:
        mine = [(e, level) for e, level in zip(found, levels, strict=True) if e["tid"] == thread]
        ticks.append(base)
        for event, level in mine:
            begin = (event["ts"] - step["ts"]) / 1e3
            bars[base + level, event["name"]].append((begin, event["dur"] / 1e3))
        base += max(level for _, level in mine) + 2
    for (row, name), spans in bars.items():
        axes.broken_barh(spans, (row, 0.9), facecolors=colours.get(name, OTHER), linewidth=0)
    for name in longest:
        short = name if len(name) < 40 else f"{name[:38]}..."
        label = f"{times[name] / 1e3:.0f} ms  {short}"
        axes.plot([], [], linewidth=6, color=colours[name], label=label)
    axes.set_yticks(ticks, [f"thread {number + 1}" for number in range(len(threads))])
    axes.invert_yaxis()
    axes.set_xlim(0, step["dur"] / 1e3)
    axes.set_xlabel(f"ms of {step['name']} ({title})")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        fontsize=8,
        frameon=False,
        loc="upper left",
        bbox_to_anchor=(1, 1),
        title="without what they call",
        title_fontsize=8,
    )
    figure.savefig(out, dpi=90)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
