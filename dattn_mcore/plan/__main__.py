"""`python -m dattn_mcore.plan`: what a run will need and cost, before it is started."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dattn_mcore.config.checks import check_config, processes_per_replica, sizes_of_replica
from dattn_mcore.config.load import load_config
from dattn_mcore.config.schema import Config
from dattn_mcore.config.sharing import why_apart
from dattn_mcore.console import cell
from dattn_mcore.errors import ConfigError, DattnError, error_lines, first_line
from dattn_mcore.plan.data_size import data_size
from dattn_mcore.plan.estimate import Plan, as_dict, make_plan
from dattn_mcore.plan.hardware import GPUS, Cluster
from dattn_mcore.plan.longest import COLUMNS, longest_rows
from dattn_mcore.plan.rank import rank_layouts
from dattn_mcore.plan.report import layout_name, notes, print_plans, print_ranking
from dattn_mcore.plan.warnings import warnings_of
from dattn_mcore.plan.workload import DataSize, Sample, full_budget_sample

PROGRAM = "python -m dattn_mcore.plan"
TEXT_OF_LONGEST = 512  # text rows of the longest sample, unless they are given
LAYOUT_FLAGS = ("tp", "cp", "pp", "vpp")


def main(arguments: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Runs the command; returns the exit status (2 for a user's mistake)."""
    try:
        _run(_parse(arguments, prog))
        return 0
    except DattnError as error:
        sys.stderr.write(error_lines(error))
        return 2


def _parse(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Memory, operations, communication and time of a run, from its configuration.",
        epilog="With --tp, --cp, --pp or a parallel.* setting only that layout is planned; "
        "without, the configuration's own is followed by a ranking of all. Any setting can follow "
        "as section.key=value.",
    )
    parser.add_argument("--config", help="YAML file (default: the embedded digits task)")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--gpu", choices=[*GPUS, "all"], default="all")
    parser.add_argument("--tp", type=int, help="tensor parallel size")
    parser.add_argument("--cp", type=int, help="context parallel size")
    parser.add_argument("--pp", type=int, help="pipeline parallel size")
    parser.add_argument("--vpp", type=int, help="model chunks per pipeline stage")
    parser.add_argument("--samples", type=int, help="of the data set (default: counted)")
    parser.add_argument("--text-per-sample", type=float, help="text rows (default: full budgets)")
    parser.add_argument("--images-per-sample", type=float, default=1.0)
    parser.add_argument(
        "--samples-per-image",
        type=float,
        default=1.0,
        help="of a micro-batch that show the same images",
    )
    parser.add_argument("--labelled-share", type=float, default=1.0, help="of text rows")
    parser.add_argument("--top", type=int, default=5, help="layouts shown in a ranking")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--plot", metavar="FILE", help="draw time and memory over visual rows")
    parser.add_argument(
        "--longest", action="store_true", help="only: most visual rows of a sample, over layouts"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser.parse_intermixed_args(arguments)


def _run(chosen: argparse.Namespace) -> None:
    for name in ("nodes", "gpus_per_node", "top"):
        if getattr(chosen, name) < 1:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} {getattr(chosen, name)} must be at least 1")
    flags = [
        f"parallel.{name}={getattr(chosen, name)}"
        for name in LAYOUT_FLAGS
        if getattr(chosen, name) is not None
    ]
    if chosen.samples is not None and chosen.samples < 1:
        raise ConfigError(f"--samples {chosen.samples} must be at least 1")
    config = load_config(chosen.config, [*chosen.overrides, *flags])
    named = bool(flags) or any(item.startswith("parallel.") for item in chosen.overrides)
    if flags and not any(item.startswith("parallel.sp=") for item in chosen.overrides):
        parallel = dataclasses.replace(config.parallel, sp=config.parallel.tp > 1)
        config = dataclasses.replace(config, parallel=parallel)
    check_config(config)
    cluster = Cluster(chosen.nodes, chosen.gpus_per_node)
    kinds = list(GPUS) if chosen.gpu == "all" else [chosen.gpu]
    if chosen.longest:
        _check_longest(chosen, named)
        _longest(config, cluster, kinds, chosen.text_per_sample)
        return
    replica = processes_per_replica(config)
    if cluster.world_size % replica:
        raise ConfigError(
            f"--nodes {chosen.nodes} x --gpus-per-node {chosen.gpus_per_node} are "
            f"{cluster.world_size} GPUs, and one model takes {replica} "
            f"({sizes_of_replica(config)}): choose a multiple of it, or another --tp or --pp"
        )
    sample, assumed = _sample(config, chosen)
    data = DataSize(chosen.samples) if chosen.samples is not None else data_size(config)
    combinations = [
        (GPUS[kind], fp8)
        for kind in kinds
        for fp8 in ((False, True) if config.train.precision == "bf16" else (False,))
    ]
    plans = [make_plan(config, cluster, gpu, fp8, sample) for gpu, fp8 in combinations]
    rankings = []
    if not named:
        rankings = [rank_layouts(config, cluster, gpu, fp8, sample) for gpu, fp8 in combinations]
    remarks = notes(config, sample, assumed, data)
    name = chosen.config or "the embedded digits task"
    if chosen.plot:
        _plot(chosen.plot, name, config, cluster, plans[-1], sample)
        remarks.append(f"picture: {chosen.plot}")
    if chosen.json:
        result = {
            "nodes": chosen.nodes,
            "gpus_per_node": chosen.gpus_per_node,
            "sample": dataclasses.asdict(sample),
            "samples": data.samples,
            "plans": [_as_dict(plan, data) for plan in plans],
            "rankings": [
                [_as_dict(plan, data) for plan in ranking[: chosen.top]] for ranking in rankings
            ],
            "notes": remarks,
        }
        sys.stdout.write(json.dumps(result, indent=1) + "\n")
        return
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    console.print(cell(f"{name} on {cluster.nodes} x {cluster.gpus_per_node} GPUs"))
    print_plans(console, plans, data)
    for ranking in rankings:
        print_ranking(console, ranking, chosen.top, data)
    for line in remarks:
        console.print(cell(f"- {line}"))


def _sample(config: Config, chosen: argparse.Namespace) -> tuple[Sample, list[str]]:
    """The average sample, and what had to be assumed about it."""
    text, images = chosen.text_per_sample, chosen.images_per_sample
    share, per_image = chosen.labelled_share, chosen.samples_per_image
    for flag, value, lowest, highest in (
        ("--images-per-sample", images, 0.0, math.inf),
        ("--text-per-sample", text, 1.0, math.inf),
        ("--labelled-share", share, 0.0, 1.0),
        ("--samples-per-image", per_image, 1.0, math.inf),
    ):
        # Written so that what is no number fails.
        if value is not None and not (lowest <= value <= highest and value < math.inf):
            limits = f"at least {lowest:g}" if highest == math.inf else f"{lowest:g} to {highest:g}"
            raise ConfigError(f"{flag} {value:g} must be a number, {limits}")
    if per_image > 1 and (reason := why_apart(config)) is not None:
        raise ConfigError(
            f"--samples-per-image {per_image:g} must be 1 where samples share no visual rows "
            f"({reason}); leave it out, or change that setting"
        )
    if text is not None:
        return Sample(text, images, share, per_image), []
    text = full_budget_sample(config, images)
    return Sample(text, images, share, per_image), [
        f"text rows of a sample are assumed ({text:,.0f}: both budgets full); give "
        "--text-per-sample where you know better"
    ]


def _check_longest(chosen: argparse.Namespace, named: bool) -> None:
    """Refuses what a table of the longest samples leaves aside."""
    aside = ["a layout (--tp, --cp, --pp, --vpp, parallel.*)"] * named
    aside += [f"--{name}" for name in ("json", "plot") if getattr(chosen, name)]
    if aside:
        raise ConfigError(
            f"--longest tries all layouts and prints a table alone; leave out {', '.join(aside)}"
        )


def _longest(config: Config, cluster: Cluster, kinds: list[str], text: float | None) -> None:
    """Prints a table for each kind of GPU."""
    if text is not None and not 1 <= text < math.inf:
        raise ConfigError(f"--text-per-sample {text:g} must be a number, at least 1")
    rows = round(text) if text is not None else TEXT_OF_LONGEST
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    for kind in kinds:
        table = Table(title=f"longest sample, {GPUS[kind].name}, bf16, {rows:,} text rows")
        for column in COLUMNS:
            table.add_column(column)
        for cells in longest_rows(config, cluster, GPUS[kind], rows):
            table.add_row(*cells)
        console.print(table)
    console.print("computed, not measured; the baseline's ring attention is not built")


def _as_dict(plan: Plan, data: DataSize) -> dict[str, Any]:
    return {**as_dict(plan, data), "warnings": warnings_of(plan)}


def _plot(
    path: str, name: str, config: Config, cluster: Cluster, plan: Plan, sample: Sample
) -> None:
    from dattn_mcore.plan.plot import draw, over_visual_rows

    curves = over_visual_rows(config, cluster, plan.gpu, plan.fp8, sample.text)
    precision = "FP8" if plan.fp8 else config.train.precision
    gpus = f"{cluster.nodes} x {cluster.gpus_per_node} {plan.gpu.name}"
    title = f"{name}, {gpus}, {precision}: {layout_name(plan)}"
    try:
        draw(curves, Path(path), title)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise ConfigError(f"--plot {path} cannot be written ({reason}); name a .png file") from None


if __name__ == "__main__":
    sys.exit(main())
