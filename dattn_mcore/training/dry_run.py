"""What `--dry-run` prints: the resolved configuration, the layout, parameters and rows per rank."""

from __future__ import annotations

import math
from dataclasses import replace

from dattn_mcore.architectures.adapters import adapter_table
from dattn_mcore.config.checks import (
    data_parallel_size,
    processes_per_replica,
    shards_of,
    sizes_of_replica,
)
from dattn_mcore.config.load import to_yaml
from dattn_mcore.config.lora import adapters_of
from dattn_mcore.config.schedule import schedule_of
from dattn_mcore.config.schema import Config
from dattn_mcore.config.sharing import why_apart
from dattn_mcore.layers.attention import BackendChoice, choose_backend
from dattn_mcore.layers.spec import attention_options
from dattn_mcore.parallel.gpus import resolve_device
from dattn_mcore.plan.disk import disk_lines
from dattn_mcore.plan.learning import learning_lines
from dattn_mcore.plan.parameters import layers_of_stage, stage_parameters
from dattn_mcore.plan.tower_lines import tower_lines
from dattn_mcore.plan.warnings import part_full
from dattn_mcore.plan.workload import Sample, full_budget_sample, pack_multiple, step_of
from dattn_mcore.training.runtime import params_dtype
from dattn_mcore.training.schedule import rate_of


def describe(config: Config, world_size: int) -> str:
    """The dry run's text.

    Args:
        config: a checked configuration.
        world_size: processes started; with one, as many as one replica needs are assumed.
    """
    parallel = config.parallel
    world = processes_per_replica(config) if world_size == 1 else world_size
    dp = data_parallel_size(config, world)
    vision = config.model.vision
    rows = vision.rows_per_tile
    lines = [
        to_yaml(config),
        f"layout: {world} processes = {sizes_of_replica(config)} x dp {dp}"
        + (f", {parallel.vpp} chunks per stage" if parallel.vpp > 1 else "")
        + (", sequence parallel" if parallel.sp else ""),
        "",
        f"{'stage':>5}  {'parameters per rank':>20}  {'trained':>14}  holds",
    ]
    for stage in range(parallel.pp):
        total, trained, holds = stage_summary(config, stage)
        lines.append(f"{stage:>5}  {total:>20,}  {trained:>14,}  {holds}")
    lines += ["", *learning_lines(config), *_schedule_lines(config)]
    shards = shards_of(config).ranks
    most = config.data.max_tiles
    tiles = "1" if most == 1 else f"up to {most}"
    text, visual = config.data.text_budget, config.data.visual_budget
    lines += [
        "",
        f"rows of a full micro-batch: {visual:,} visual ({visual // rows} tiles of {rows} rows; "
        f"an image has {tiles}) and {text:,} text",
        f"rows per rank between layers: {visual // shards:,} visual and {text // shards:,} text",
        _sharing_line(config),
        *_global_batch(config, dp),
        *_adapter_lines(config),
        *_attention_lines(config),
        *tower_lines(config, dp),
        *disk_lines(config),
        "",
    ]
    return "\n".join(lines)


def _sharing_line(config: Config) -> str:
    """Whether samples share visual rows."""
    if (reason := why_apart(config)) is not None:
        return f"every sample has visual rows of its own: {reason}"
    return "samples of a micro-batch that show the same images share their visual rows"


def _schedule_lines(config: Config) -> list[str]:
    """The learning rate over the run, where its steps are known before the data are opened."""
    optim, steps = config.optim, config.train.steps
    if steps is None:
        return [
            f"learning rate: {optim.schedule}; warm-up and decay once the run's steps are known"
        ]
    schedule = schedule_of(optim, steps)
    line = f"learning rate: warm-up over {schedule.warmup} of {steps} steps, then {optim.schedule}"
    if optim.schedule == "wsd":
        line += ", at the peak to the end"
        if schedule.final_decay:
            line = line.replace("to the end", f"to step {schedule.falls_from - 1}")
            line += f", then {optim.wsd_decay} decay"
    rates = [f"{rate_of(optim, steps, step):.3g} in step {step}" for step in sorted({1, steps})]
    return [f"{line}; of optim.lr={optim.lr:g}: {', '.join(rates)}"]


def attention_backends(config: Config, device_type: str) -> list[tuple[str, BackendChoice]]:
    """The attention backend of each kind of layer, and why.

    Args:
        config: a checked configuration.
        device_type: cpu, or another for a GPU.

    Returns:
        (which layers, choice); one entry where all layers are alike.

    Raises:
        ConfigError: the backend asked for cannot run there or compute this model.
    """
    options = attention_options(config.model.llm, config.attention)
    windows = sorted(set(config.model.llm.windows), key=lambda window: window or 0, reverse=True)
    kinds = [
        (
            "all layers" if len(windows) == 1 else "windowed layers" if window else "other layers",
            replace(options, window=window),
        )
        for window in windows
    ]
    head_dim, dtype = config.model.llm.head_dim, params_dtype(config)
    chosen = [
        (name, choose_backend(config.attention.backend, kind, device_type, dtype, head_dim))
        for name, kind in kinds
    ]
    alike = len({choice for _, choice in chosen}) == 1
    return [("all layers", chosen[0][1])] if alike else chosen


def _global_batch(config: Config, dp: int) -> list[str]:
    """Samples of a step, and whether they are enough for the replicas.

    Lengths are not known before the data are opened; the warning takes both budgets as full.
    """
    size, multiple = config.train.global_batch_size, config.data.step_packs_multiple
    line = f"global batch: {size} samples"
    if multiple is not None:
        line = (
            f"global batch: about {size} samples, in full micro-batches, a multiple of {multiple}"
        )
        needed = pack_multiple(config, dp)
        if multiple % needed:
            line += (
                f"; {dp} replicas round it up to a multiple of {needed} and then leave packs less "
            )
            line += "full: set data.step_packs_multiple to one"
    images = 1.0 if config.data.visual_budget >= config.model.vision.rows_per_tile else 0.0
    sample = Sample(full_budget_sample(config, images), images)
    problem = part_full(config, step_of(config, sample, dp), dp)
    return [line, f"warning: {problem}, if samples are like the budgets"] if problem else [line]


def _adapter_lines(config: Config) -> list[str]:
    """Which linears have adapters, and how many parameters these are."""
    adapters = adapters_of(config)
    if adapters is None:
        return []
    table = adapter_table(config.model, adapters)
    names = sorted({name.split(".")[-2] for name in adapters.targets})
    count = sum(math.prod(entry.mcore_shape()) for entry in table)
    kind = "DoRA" if adapters.dora else "LoRA"
    return [
        f"adapters: {kind} of rank {adapters.rank} at {len(adapters.targets)} linears "
        f"({', '.join(names)}), {count:,} parameters; the rest of the language model is frozen"
        + (" but for what optim.groups names" if config.optim.groups else "")
    ]


def _attention_lines(config: Config) -> list[str]:
    """The backends for the device of the run, which this machine need not have."""
    device: str = config.train.device
    if device == "auto":
        device = resolve_device("auto")
    lines = []
    for layers, choice in attention_backends(config, device):
        lines.append(f"attention backend on a {device.upper()}: {choice.name}, {layers}")
        lines[-1] += f" ({choice.reason})"
    return lines


def stage_summary(config: Config, stage: int) -> tuple[int, int, str]:
    """Parameters on one rank of a stage, those trained, and what it holds; from shapes alone."""
    parameters = [p for chunk in stage_parameters(config, stage) for p in chunk]
    chunks = layers_of_stage(config, stage)
    holds = ["layers " + ", ".join(f"{c[0]}-{c[-1]}" for c in chunks if c)]
    if stage == 0:
        holds = ["vision tower", "projector", "embedding", *holds]
    if stage == config.parallel.pp - 1:
        holds += ["final norm", "output layer"]
    total = sum(p.numel for p in parameters)
    return total, sum(p.numel for p in parameters if p.trained), ", ".join(holds)
