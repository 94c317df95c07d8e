"""The most visual rows of one sample that fit a cluster, over all layouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from dattn_mcore.config.schema import Config, TrainConfig
from dattn_mcore.errors import ConfigError
from dattn_mcore.plan.estimate import Plan, plan_unchecked
from dattn_mcore.plan.hardware import Cluster, Gpu
from dattn_mcore.plan.plot import baseline
from dattn_mcore.plan.report import layout_name
from dattn_mcore.plan.workload import Sample

COLUMNS = ["GPUs", "attention", "visual rows", "layout", "GiB a GPU", "rows/s/GPU"]
MOST_TILES = 2**20
CHUNK = 8192  # visual rows that are computed again at once


def longest_plan(config: Config, cluster: Cluster, gpu: Gpu, text: int) -> Plan | None:
    """The plan of the longest sample that fits, in bf16; None where none does.

    One sample a micro-batch, of one run of images; as many samples a step as the cluster has GPUs.
    Tried are all tensor (within a node), context and pipeline parallel sizes that are powers of
    two, full recompute, and with D-Attn also visual rows in chunks. Tiles are added while the
    plan fits; every context parallel rank has one at least. The baseline's rows are divided as ring
    attention divides them.

    Args:
        config: model and attention; its layout and its budgets are left aside.
        cluster: GPUs in nodes.
        gpu: their kind.
        text: text rows of a sample.
    """
    best: Plan | None = None
    tiles = 0
    for candidate in _candidates(config, cluster, text):
        plan = _fitting(candidate, cluster, gpu, tiles + 1)
        if plan is None:
            continue
        low, high = tiles + 1, tiles + 1  # fits; the first that does not, once it is found
        while plan is not None and high < MOST_TILES:
            best, low = plan, high
            high *= 2
            plan = _fitting(candidate, cluster, gpu, high)
        while high - low > 1:
            middle = (low + high) // 2
            if (plan := _fitting(candidate, cluster, gpu, middle)) is not None:
                best, low = plan, middle
            else:
                high = middle
        tiles = low
    return best


def longest_rows(config: Config, cluster: Cluster, gpu: Gpu, text: int) -> list[list[str]]:
    """Cells of `COLUMNS` for D-Attn and for the baseline; see `longest_plan`."""
    rows = []
    for name, kind in (("D-Attn", config), ("baseline, ring attention", baseline(config))):
        plan = longest_plan(kind, cluster, gpu, text)
        cells = ["0", "no layout fits", "", ""]
        if plan is not None:
            chunk = plan.config.train.recompute_visual_chunk
            layout = layout_name(plan) + (f", chunks of {chunk:,}" if chunk else "")
            cells = [
                f"{plan.step.pack.visual:,.0f}",
                layout,
                f"{plan.worst.total / 2**30:.1f}",
                f"{plan.tokens_per_second_per_gpu:,.0f}",
            ]
        rows.append([str(cluster.world_size), name, *cells])
    return rows


def _fitting(config: Config, cluster: Cluster, gpu: Gpu, tiles: int) -> Plan | None:
    """The plan with so many tiles, if it fits and each rank has one."""
    rows = max(tiles, config.parallel.cp) * config.model.vision.rows_per_tile
    data = dataclasses.replace(config.data, visual_budget=rows)
    sample = Sample(data.text_budget, max(tiles, config.parallel.cp))
    try:
        fixed = dataclasses.replace(config, data=data)
        plan = plan_unchecked(fixed, cluster, gpu, False, sample)
    except ConfigError:
        return None
    return plan if plan.fits else None


def _candidates(config: Config, cluster: Cluster, text: int) -> Iterator[Config]:
    llm, world = config.model.llm, cluster.world_size
    powers = [2**n for n in range(world.bit_length())]
    data = dataclasses.replace(config.data, text_budget=text, step_packs_multiple=None)
    for tp in (size for size in powers if size <= cluster.gpus_per_node):
        if llm.num_attention_heads % tp or llm.ffn_hidden_size % tp:
            continue
        for pp in (size for size in powers if llm.num_layers % size == 0):
            for cp in (size for size in powers if tp * pp * size <= world):
                parallel = dataclasses.replace(
                    config.parallel,
                    tp=tp,
                    pp=pp,
                    vpp=1,
                    cp=cp,
                    sp=tp > 1,
                    first_stage_layers=None,
                    overlap_grad_reduce=False,
                    overlap_param_gather=False,
                )
                for train in _recompute(config, world):
                    yield dataclasses.replace(config, parallel=parallel, data=data, train=train)


def _recompute(config: Config, batch: int) -> list[TrainConfig]:
    full = dataclasses.replace(
        config.train,
        fp8="none",
        global_batch_size=batch,
        recompute="full",
        recompute_layers=None,
        recompute_modules=("core_attn",),
        recompute_visual_chunk=None,
    )
    if config.attention.v2v != "diagonal":
        return [full]
    return [full, dataclasses.replace(full, recompute_visual_chunk=CHUNK)]
