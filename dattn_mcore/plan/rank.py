"""All layouts of a cluster that keep the rules, best first."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from dattn_mcore.config.schema import Config, TrainConfig
from dattn_mcore.errors import ConfigError
from dattn_mcore.plan.estimate import Plan, make_plan
from dattn_mcore.plan.hardware import Cluster, Gpu
from dattn_mcore.plan.workload import Sample


def rank_layouts(
    config: Config, cluster: Cluster, gpu: Gpu, fp8: bool, sample: Sample
) -> list[Plan]:
    """Plans every layout; those that fit come first, the fastest of each first.

    Tensor parallel groups stay within a node, where sequence parallelism comes with them. Context
    parallel groups are as large as a full micro-batch has tiles.
    """
    plans = []
    for candidate in _candidates(config, cluster):
        try:
            plans.append(make_plan(candidate, cluster, gpu, fp8, sample))
        except ConfigError:
            continue  # heads, layers or rows that cannot be divided so
    return sorted(plans, key=lambda plan: (not plan.fits, plan.seconds))


def _candidates(config: Config, cluster: Cluster) -> Iterator[Config]:
    layers, world = config.model.llm.num_layers, cluster.world_size
    for tp in _divisors(cluster.gpus_per_node):
        sizes = [(cp, pp) for cp in _context_sizes(config, world) for pp in range(1, layers + 1)]
        for cp, pp in sizes:
            if world % (tp * cp * pp):
                continue
            for vpp, first in _splits(layers, pp):
                for train in _recompute(config.train):
                    yield dataclasses.replace(
                        config,
                        parallel=dataclasses.replace(
                            config.parallel,
                            tp=tp,
                            cp=cp,
                            pp=pp,
                            vpp=vpp,
                            sp=tp > 1,
                            first_stage_layers=first,
                        ),
                        train=train,
                    )


def _context_sizes(config: Config, world: int) -> list[int]:
    """Sizes that leave no rank without a tile in a full micro-batch."""
    if config.attention.v2v != "diagonal":
        return [1]
    tiles = config.data.visual_budget // config.model.vision.rows_per_tile
    return [size for size in _divisors(world) if size <= max(tiles, 1)]


def _recompute(train: TrainConfig) -> Iterable[TrainConfig]:
    """Nothing again, everything again, and what the configuration says."""
    plain = dataclasses.replace(train, recompute_layers=None, recompute_modules=("core_attn",))
    ends = [dataclasses.replace(plain, recompute=recompute) for recompute in ("none", "full")]
    return dict.fromkeys([*ends, train])


def _splits(layers: int, pp: int) -> Iterator[tuple[int, int | None]]:
    """(model chunks, layers of the first stage): even splits, and a first stage with fewer."""
    if pp == 1:
        yield 1, None
        return
    for vpp in range(1, 5):
        if layers % (pp * vpp) == 0:
            yield vpp, None
    even = -(-layers // pp)
    for first in range(even - 1, even // 2, -1):
        if (layers - first) % (pp - 1) == 0:
            yield 1, first
            return


def _divisors(value: int) -> list[int]:
    return [n for n in range(1, value + 1) if value % n == 0]
