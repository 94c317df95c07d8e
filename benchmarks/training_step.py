"""Time of one training step over the number of visual rows: D-Attn, baseline, Hugging Face's LLaVA.

    python -m benchmarks.training_step                          # small model, CPU
    python -m benchmarks.training_step --device gpu --size mistral --layers 8

Forward, backward and optimizer; see benchmarks.steps for what runs. The three take turns in one
process, by the wall clock; the machine should do nothing else. Exit status 1 on a CPU: a peer was
faster at some number of visual rows, or a ratio did not grow from one number to the next.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from dattn_mcore.parallel import entry

entry.prepare_imports("gpu")  # Megatron-Core's import dies of a broken package

from benchmarks.measure import matmul_rate, seconds_in_turn
from benchmarks.results import add_arguments, hand_over, markdown_table, number_ticks
from benchmarks.steps import BASELINE, SIZES, llava_step, our_step, sized_config
from dattn_mcore.parallel import platform
from dattn_mcore.parallel.groups import single_process
from dattn_mcore.plan.flops import step_work
from dattn_mcore.plan.rows import rows_of

PEERS = ("baseline", "llava")


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each number of visual rows."""
    rows = []
    with single_process(args.device) as groups:
        device = platform.current_device()
        ours = sized_config(args.size, args.device, args.layers)
        base = sized_config(args.size, args.device, args.layers, **BASELINE)
        torch.manual_seed(0)
        steps = {
            "dattn": our_step(ours, groups, device, args.visual, args.text),
            "baseline": our_step(base, groups, device, args.visual, args.text),
            "llava": llava_step(ours, device, args.visual, args.text),
        }
        for visual in args.visual:
            runs = {name: step[visual] for name, step in steps.items()}
            times: dict[str, float | None] = dict.fromkeys(runs)  # None: too little memory
            times |= seconds_in_turn(runs, args.repeats, device)
            layouts = (((True, visual), (False, args.text)),)
            costs = {}
            for name, config in (("dattn", ours), ("baseline", base)):
                work = step_work(config, rows_of(config, layouts, args.text - args.text // 2))
                costs[name] = sum(part.executed for part in work.values())
            peak = matmul_rate(device)
            rows.append({"visual": visual, **times, "flops": costs, "matmul": peak})
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Measures and hands over; see the file's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--layers", type=int, default=None, help="of the language model")
    parser.add_argument("--text", type=int, default=64)
    parser.add_argument("--visual", type=int, nargs="+", default=[576, 1152, 2304])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(arguments)
    rows = measure(args)
    ratios = {
        name: {
            row["visual"]: row[name] / row["dattn"] for row in rows if row[name] and row["dattn"]
        }
        for name in PEERS
    }

    def cells(row: dict[str, Any]) -> list[str]:
        visual, ours = row["visual"], row["dattn"]
        seconds = (row[name] for name in ("dattn", *PEERS))
        compared = (ratios[name].get(visual) for name in PEERS)
        return [
            str(visual),
            *(f"{value:.3f}" if value else "no memory" for value in seconds),
            *(f"{value:.2f}" if value else "" for value in compared),
            f"{row['flops']['baseline'] / row['flops']['dattn']:.2f}",
            f"{row['flops']['dattn'] / ours / 1e12:.3f}" if ours else "",
            f"{row['flops']['dattn'] / ours / row['matmul']:.0%}" if ours else "",
        ]

    table = markdown_table(
        (
            "visual rows",
            "D-Attn, s",
            "baseline, s",
            "LLaVA, s",
            "baseline / D-Attn",
            "LLaVA / D-Attn",
            "in FLOPs: baseline / D-Attn",
            "D-Attn, TFLOP/s",
            "of torch.mm's",
        ),
        map(cells, rows),
    )

    def draw(axes: Any) -> None:
        for name, label in (("baseline", "baseline in this code"), ("llava", "LLaVA, SDPA")):
            axes.plot(*zip(*ratios[name].items(), strict=True), "o-", label=label)
        axes.axhline(1.0, color="grey", linewidth=0.8)
        axes.set(xlabel="visual rows", ylabel="time of a step, D-Attn's = 1", xscale="log")
        axes.set_title(f"training step, {args.size}, {args.text} text rows, {args.device}")
        number_ticks(axes, args.visual)
        axes.legend()

    hand_over(f"training-step-{args.size}", args, table, rows, draw)
    measured = [list(ratios[name].values()) for name in PEERS]
    missed = any(min(values) <= 1 or values != sorted(values) for values in measured)
    return int(missed and args.device == "cpu")


if __name__ == "__main__":
    sys.exit(main())
