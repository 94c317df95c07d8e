"""A true-size training step, measured, next to what the planner predicted, over visual rows.

    python -m benchmarks.planned_step --device gpu --size mistral --precision bf16 tensorwise
    python -m benchmarks.planned_step --size small --gpu h100   # on a CPU: that it runs

One GPU, one pack, real layers: as many of the language model's as the planner says fit with the
most visual rows, fewer where it was wrong. Forward, backward and optimizer of D-Attn with a frozen
CLIP tower. Tokens are text and visual rows; MFU counts the model's operations by the closed form
(recompute left out) over the device's peak in the precision of the linears; memory is what tensors
took at most, and what the planner says without its allowance for libraries.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import sys
from typing import Any

import torch

from dattn_mcore.parallel import entry

entry.prepare_imports("gpu")  # Megatron-Core's import dies of a broken package

from megatron.core.process_groups_config import ProcessGroupCollection

from benchmarks.measure import seconds_in_turn
from benchmarks.results import add_arguments, hand_over, markdown_table
from benchmarks.steps import SIZES, our_step, sized_config
from dattn_mcore.config.checks import check_config
from dattn_mcore.config.schema import Config
from dattn_mcore.errors import ConfigError
from dattn_mcore.parallel import platform
from dattn_mcore.parallel.groups import single_process
from dattn_mcore.plan.estimate import Plan, make_plan
from dattn_mcore.plan.flops import step_work
from dattn_mcore.plan.hardware import GPUS, LIBRARY_BYTES, Cluster, Gpu, peak_flops
from dattn_mcore.plan.workload import Sample

PRECISIONS = ("fp32", "bf16", "delayed", "tensorwise", "blockwise")
LABELLED_SHARE = 0.5  # what benchmarks.steps supervises
GIB = 2**30


def config_for(args: argparse.Namespace, precision: str, layers: int | None) -> Config:
    """The size's configuration in a precision: fp32, bf16, or a recipe of FP8."""
    config = sized_config(args.size, args.device, layers)
    fp8 = precision if precision not in ("fp32", "bf16") else "none"
    train = dataclasses.replace(
        config.train, precision="fp32" if precision == "fp32" else "bf16", fp8=fp8
    )
    # FP8 products take rows in multiples of 16, so the others get them too.
    data = dataclasses.replace(config.data, pad_multiple=16)
    config = dataclasses.replace(config, train=train, data=data)
    check_config(config)
    return config


def plan_for(config: Config, gpu: Gpu, text: int, visual: int) -> Plan:
    """The planner's word on one step of one pack on one GPU."""
    data = dataclasses.replace(config.data, text_budget=text, visual_budget=visual)
    train = dataclasses.replace(config.train, global_batch_size=1)
    alone = dataclasses.replace(config, data=data, train=train)
    sample = Sample(text, visual / config.model.vision.rows_per_tile, LABELLED_SHARE)
    return make_plan(alone, Cluster(1, 1), gpu, config.train.fp8 != "none", sample)


def most_layers(args: argparse.Namespace, precision: str, gpu: Gpu) -> int:
    """The largest number of layers that the planner says fit with the most visual rows."""
    full = config_for(args, precision, None).model.llm.num_layers
    for layers in range(full, 2, -1):
        if plan_for(config_for(args, precision, layers), gpu, args.text, max(args.visual)).fits:
            return layers
    return 2


def measure_one(
    args: argparse.Namespace, config: Config, groups: ProcessGroupCollection
) -> dict[int, tuple[float, int]]:
    """Seconds and peak bytes of a step for each number of visual rows.

    Raises:
        torch.OutOfMemoryError: the layers do not fit.
    """
    device = platform.current_device()
    steps = our_step(config, groups, device, args.visual, args.text)
    found = {}
    for visual, step in sorted(steps.items(), reverse=True):  # what does not fit fails at once
        step()  # the optimizer's state exists from here on, and FP8 has its first scales
        platform.reset_peak_memory()
        step()
        peak = platform.peak_memory()
        times = seconds_in_turn({"step": step}, args.repeats, device)
        if "step" not in times:
            raise torch.OutOfMemoryError(f"{visual} visual rows")
        found[visual] = times["step"], peak
    return found


def measure(args: argparse.Namespace, gpu: Gpu) -> list[dict[str, Any]]:
    """One row for each precision and number of visual rows, or one with the reason for none."""
    rows: list[dict[str, Any]] = []
    with single_process(args.device) as groups:
        for precision in args.precision:
            layers = args.layers or most_layers(args, precision, gpu)
            measured: dict[int, tuple[float, int]] | None = None
            while measured is None and layers >= 2:
                config = config_for(args, precision, layers)
                try:
                    measured = measure_one(args, config, groups)
                except torch.OutOfMemoryError:
                    layers -= 2
                except ConfigError as error:  # no Transformer Engine, say
                    rows.append({"precision": precision, "reason": str(error)})
                    break
                finally:
                    gc.collect()
                    platform.empty_cache()
            for visual, (seconds, peak) in sorted((measured or {}).items()):
                at = {"precision": precision, "layers": layers, "visual": visual}
                rows.append(at | compare(args, config, gpu, visual, seconds, peak))
    return rows


def compare(
    args: argparse.Namespace, config: Config, gpu: Gpu, visual: int, seconds: float, peak: int
) -> dict[str, Any]:
    """Measured and planned tokens a second, MFU and bytes."""
    plan = plan_for(config, gpu, args.text, visual)
    flops = sum(work.total for work in step_work(config, plan.step.rows).values())
    device_peak = peak_flops(
        platform.device_name(), "fp8" if config.train.fp8 != "none" else config.train.precision
    )
    return {
        "seconds": seconds,
        "tokens_per_second": (args.text + visual) / seconds,
        "mfu": flops / seconds / device_peak if device_peak else None,
        "peak_bytes": peak or None,  # not counted on a CPU
        "planned_tokens_per_second": plan.tokens_per_second_per_gpu,
        "planned_mfu": plan.mfu,
        "planned_bytes": plan.worst.total - LIBRARY_BYTES,
    }


def cells(row: dict[str, Any]) -> list[str]:
    """A line of the table."""
    if "reason" in row:
        return [row["precision"], f"not measured: {row['reason']}", *[""] * 8]
    measured, planned = row["tokens_per_second"], row["planned_tokens_per_second"]
    mfu, peak = row["mfu"], row["peak_bytes"]
    return [
        row["precision"],
        str(row["layers"]),
        str(row["visual"]),
        f"{measured:,.0f}",
        f"{planned:,.0f}",
        f"{measured / planned:.2f}",
        "" if mfu is None else f"{mfu:.1%}",
        f"{row['planned_mfu']:.1%}",
        "" if peak is None else f"{peak / GIB:.1f}",
        f"{row['planned_bytes'] / GIB:.1f}",
    ]


def planned_gpu(name: str | None) -> Gpu:
    """The kind asked for, else the device's own, else an H100."""
    words = platform.device_name().replace("-", " ").split()
    own = (kind for kind, gpu in GPUS.items() if gpu.name in words)
    return GPUS[name or next(own, "h100")]


def main(arguments: list[str] | None = None) -> int:
    """Measures and hands over; see the file's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["fp32"])
    parser.add_argument("--layers", type=int, default=None, help="default: as many as fit")
    parser.add_argument("--gpu", choices=GPUS, default=None, help="planned (default: this one)")
    parser.add_argument("--text", type=int, default=512)
    parser.add_argument("--visual", type=int, nargs="+", default=[576, 1152])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(arguments)
    platform.install(args.device)
    gpu = planned_gpu(args.gpu)
    rows = measure(args, gpu)
    table = markdown_table(
        (
            "linears",
            "layers",
            "visual rows",
            "tokens/s",
            f"planned, {gpu.name}",
            "measured / planned",
            "MFU",
            "planned MFU",
            "GiB",
            "planned GiB",
        ),
        map(cells, rows),
    )
    measured = [row for row in rows if "reason" not in row]

    def draw(axes: Any) -> None:
        for precision in dict.fromkeys(row["precision"] for row in measured):
            mine = [row for row in measured if row["precision"] == precision]
            visual = [row["visual"] for row in mine]
            (line,) = axes.plot(visual, [row["tokens_per_second"] for row in mine], "o-")
            line.set_label(f"{precision}, measured")
            planned = [row["planned_tokens_per_second"] for row in mine]
            axes.plot(visual, planned, "--", color=line.get_color(), label="planned")
        axes.set(xlabel="visual rows", ylabel="tokens/s", xscale="log", yscale="log")
        axes.set_title(f"training step, {args.size}, {args.text} text rows, {args.device}")
        if measured:
            axes.legend()

    hand_over(f"planned-step-{args.size}", args, table, rows, draw)
    if measured:
        ratios = [row["tokens_per_second"] / row["planned_tokens_per_second"] for row in measured]
        sys.stdout.write(f"measured / planned, median: {statistics.median(ratios):.2f}\n")
    return int(not measured)


if __name__ == "__main__":
    sys.exit(main())
