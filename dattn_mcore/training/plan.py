"""What `--dry-run` prints: the resolved configuration, the layout, parameters and rows per rank."""

from __future__ import annotations

from dattn_mcore.config.checks import data_parallel_size, processes_per_replica
from dattn_mcore.config.load import to_yaml
from dattn_mcore.config.schema import Config
from dattn_mcore.plan.parameters import layers_of_stage, stage_parameters


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
        f"layout: {world} processes = tp {parallel.tp} x pp {parallel.pp} x dp {dp}"
        + (f", {parallel.vpp} chunks per stage" if parallel.vpp > 1 else "")
        + (", sequence parallel" if parallel.sp else ""),
        "",
        f"{'stage':>5}  {'parameters per rank':>20}  {'trained':>14}  holds",
    ]
    for stage in range(parallel.pp):
        total, trained, holds = stage_summary(config, stage)
        lines.append(f"{stage:>5}  {total:>20,}  {trained:>14,}  {holds}")
    shards = parallel.tp if parallel.sp else 1
    most = config.data.max_tiles
    tiles = "1" if most == 1 else f"up to {most}"
    text, visual = config.data.text_budget, config.data.visual_budget
    lines += [
        "",
        f"rows of a full micro-batch: {visual:,} visual ({visual // rows} tiles of {rows} rows; "
        f"an image has {tiles}) and {text:,} text",
        f"rows per rank between layers: {visual // shards:,} visual and {text // shards:,} text",
        f"global batch: {config.train.global_batch_size} samples",
        "",
    ]
    return "\n".join(lines)


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
