"""The planner's tables and notes for people."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from dattn_mcore.config.schema import Config, TrainConfig
from dattn_mcore.plan import hardware
from dattn_mcore.plan.disk import disk_lines
from dattn_mcore.plan.estimate import Plan
from dattn_mcore.plan.warnings import warnings_of
from dattn_mcore.plan.workload import DataSize, Sample, full_packs, samples_per_pack

GIB = 2**30


def layout_name(plan: Plan) -> str:
    """Tp 4 x pp 2 x dp 16, sp, recompute full."""
    parallel = plan.config.parallel
    context = f"cp {parallel.cp} x " if parallel.cp > 1 else ""
    name = f"tp {parallel.tp} x {context}pp {parallel.pp} x dp {plan.dp}"
    if parallel.vpp > 1:
        name += f", vpp {parallel.vpp}"
    if parallel.first_stage_layers is not None:
        name += f", first stage {parallel.first_stage_layers} layers"
    if parallel.sp:
        name += ", sp"
    return f"{name}, recompute {_recompute_name(plan.config.train)}"


def _recompute_name(train: TrainConfig) -> str:
    if train.recompute == "selective":
        return " and ".join(train.recompute_modules)
    if train.recompute_layers is not None:
        return f"{train.recompute_layers} layers"
    return train.recompute


def print_plans(console: Console, plans: list[Plan], data: DataSize) -> None:
    """One layout: a line for each GPU and precision, then its parts.

    Args:
        console: where to print.
        plans: of one layout; the first one's parts are shown.
        data: what is known of the data set.
    """
    first = plans[0]
    console.print(f"\n[bold]{layout_name(first)}[/bold]")
    _summary(console, plans, data)
    for plan in _one_of_each_memory(plans):
        _memory(console, plan)
    _flops(console, first)
    _communication(console, first)
    for line in warnings_of(first):
        console.print(f"[yellow]warning:[/yellow] {line}")
    for plan in plans:
        if not plan.fits:
            console.print(
                f"[yellow]warning:[/yellow] {layout_name(plan)} will not fit {plan.gpu.name} in "
                f"{_precision(plan)}: stage {plan.worst.stage} needs {_gib(plan.worst.total)} of "
                f"{_gib(hardware.USABLE * plan.gpu.memory)} GiB"
            )


def print_ranking(console: Console, plans: list[Plan], shown: int, data: DataSize) -> None:
    """The best layouts, or the nearest misses where none fits."""
    fitting = [plan for plan in plans if plan.fits]
    best = (fitting or sorted(plans, key=lambda plan: plan.worst.total))[:shown]
    if not best:
        console.print("no layout keeps the rules on this cluster")
        return
    name = f"{best[0].gpu.name}, {_precision(best[0])}"
    title = f"best layouts, {name} ({len(fitting)} of {len(plans)} fit)"
    table = _table(
        title, "layout", "GiB a GPU", "s a step", "tokens/s/GPU", "MFU", "bubble", "full", "days"
    )
    for plan in best:
        table.add_row(
            layout_name(plan),
            _gib(plan.worst.total) + ("" if plan.fits else " does not fit"),
            f"{plan.seconds:.2f}",
            f"{plan.tokens_per_second_per_gpu:,.0f}",
            f"{plan.mfu:.1%}",
            f"{plan.bubble:.1%}",
            f"{plan.step.fill:.0%}",
            _days(plan, data),
        )
    console.print(table)


def notes(config: Config, sample: Sample, assumed: list[str], data: DataSize) -> list[str]:
    """What the numbers rest on, and what cannot be known here."""
    lines = [
        f"average sample: {sample.text:,.0f} text rows, {sample.images:g} images of "
        f"{config.model.vision.rows_per_tile} rows, {sample.labelled_share:.0%} of text labelled",
        *_sharing(sample),
        *assumed,
        "weights, gradients and optimizer states are exact; activations, logits and buffers are "
        "estimates",
        "times are a model calibrated on published numbers, not measured by this project; the "
        "project's attention kernels are assumed to run at flash-attention 3's rates",
        *_context(config),
        "not known here: data loading, other jobs on the network, failures, clock limits",
    ]
    if config.attention.backend == "reference":
        lines.append(
            "attention.backend=reference keeps a score matrix of text by visual rows, which is "
            "not counted"
        )
    lines += disk_lines(config)
    if config.train.steps is None:
        lines.append(_what_days_rest_on(config, sample, data))
    return [line for line in lines if line]


def _context(config: Config) -> list[str]:
    if config.parallel.cp == 1:
        return []
    return [
        "context parallel exchanges are counted in full, although those that an attention does not "
        "wait for may run beside it; tiles stay whole, and the rank with most is counted"
    ]


def _sharing(sample: Sample) -> list[str]:
    if sample.per_image == 1:
        return []
    return [
        f"{sample.per_image:g} samples of a micro-batch show the same images, whose rows are "
        "computed once (data.share_images); budgets hold the rows of all"
    ]


def _what_days_rest_on(config: Config, sample: Sample, data: DataSize) -> str:
    multiple, size = config.data.step_packs_multiple, config.train.global_batch_size
    if data.steps is not None:
        return f"the data's index is here: {data.steps:,} steps, counted from true lengths"
    if data.samples is None:
        return "days are unknown: data.annotations is not here; give --samples"
    if multiple is None:
        return ""
    per_pack = samples_per_pack(config, sample)
    packs = full_packs(config, per_pack)
    if packs is None:
        return (
            f"data.step_packs_multiple={multiple} is left out here: {size} samples of this length "
            f"fill {size / per_pack:.1f} packs, and with all alike the run would refuse it"
        )
    return (
        f"days are about: with data.step_packs_multiple={multiple} a step takes what fills its "
        f"{packs} packs, {packs * per_pack} of these samples; the run says how many of yours"
    )


def _summary(console: Console, plans: list[Plan], data: DataSize) -> None:
    first = plans[0]
    table = _table(
        None,
        "GPU",
        "linears",
        "GiB a GPU",
        "fits",
        "s a step",
        "tokens/s/GPU",
        "TFLOP/s/GPU",
        "MFU",
        "days",
    )
    for plan in plans:
        table.add_row(
            plan.gpu.name,
            _precision(plan),
            f"{_gib(plan.worst.total)} of {_gib(plan.gpu.memory)}",
            "yes" if plan.fits else "[red]no[/red]",
            f"{plan.seconds:.2f}",
            f"{plan.tokens_per_second_per_gpu:,.0f}",
            f"{plan.tflops_per_gpu:.0f}",
            f"{plan.mfu:.1%}",
            _days(plan, data),
        )
    console.print(table)
    pack = first.step.pack
    console.print(
        f"{_count(first.step.num_microbatches)} a replica of {pack.text:,.0f} text and "
        f"{pack.visual:,.0f} visual rows; pipeline bubble {first.bubble:.1%}; communication that "
        f"nothing hides {first.exposed_seconds / first.seconds:.1%} of the step"
    )


def _count(micro_batches: int) -> str:
    return "1 micro-batch" if micro_batches == 1 else f"{micro_batches} micro-batches"


def _memory(console: Console, plan: Plan) -> None:
    table = _table(
        f"GiB a GPU by stage, {_precision(plan)}",
        "stage",
        "parameters",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "working",
        "logits",
        "FP8 copies",
        "buffers",
        "total",
    )
    for stage in plan.memory:
        state, working = stage.state, stage.working
        values = [state.weights, state.gradients, state.optimizer, working.activations]
        values += [working.working, working.logits, working.fp8_weights, working.buffers]
        values += [stage.total]
        table.add_row(str(stage.stage), f"{state.parameters:,}", *map(_gib, values))
    console.print(table)


def _flops(console: Console, plan: Plan) -> None:
    table = _table("TFLOPs of a step, all GPUs, without recompute", *plan.flops, "total")
    values = [*plan.flops.values(), sum(plan.flops.values())]
    table.add_row(*(f"{value / 1e12:,.1f}" for value in values))
    console.print(table)


def _communication(console: Console, plan: Plan) -> None:
    table = _table("a rank sends in a step", "group", "ranks", "GiB", "s before overlap")
    for exchange in plan.exchanges:
        if exchange.size > 1:
            row = exchange.group, str(exchange.size), _gib(exchange.bytes)
            table.add_row(*row, f"{exchange.seconds:.3f}")
    if table.row_count:
        console.print(table)


def _one_of_each_memory(plans: list[Plan]) -> list[Plan]:
    return list({plan.fp8: plan for plan in reversed(plans)}.values())[::-1]


def _table(title: str | None, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def _precision(plan: Plan) -> str:
    return "FP8" if plan.fp8 else plan.config.train.precision


def _gib(value: float) -> str:
    return f"{value / GIB:.1f}"


def _days(plan: Plan, data: DataSize) -> str:
    days = plan.days(data)
    if days is None:
        return "unknown"
    return f"about {days:.2f}" if plan.days_are_about(data) else f"{days:.2f}"
