"""All layouts of a cluster that keep the rules, best first."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from dattn_mcore.config.schema import Config
from dattn_mcore.errors import ConfigError
from dattn_mcore.plan.estimate import Plan, make_plan
from dattn_mcore.plan.hardware import Cluster, Gpu
from dattn_mcore.plan.workload import Sample


def rank_layouts(
    config: Config, cluster: Cluster, gpu: Gpu, fp8: bool, sample: Sample
) -> list[Plan]:
    """Plans every layout; those that fit come first, the fastest of each first.

    Tensor parallel groups stay within a node, where sequence parallelism comes with them.
    """
    plans = []
    for candidate in _candidates(config, cluster):
        try:
            plans.append(make_plan(candidate, cluster, gpu, fp8, sample))
        except ConfigError:
            continue  # heads, layers or rows that cannot be divided so
    return sorted(plans, key=lambda plan: (not plan.fits, plan.seconds))


def _candidates(config: Config, cluster: Cluster) -> Iterator[Config]:
    layers = config.model.llm.num_layers
    for tp in _divisors(cluster.gpus_per_node):
        for pp in _divisors(layers):
            if tp * pp > cluster.world_size or cluster.world_size % (tp * pp):
                continue
            for vpp in _divisors(layers // pp) if pp > 1 else [1]:
                if vpp > 4:
                    continue
                for recompute in ("none", "full"):
                    multiple = config.data.pad_multiple
                    yield dataclasses.replace(
                        config,
                        parallel=dataclasses.replace(
                            config.parallel, tp=tp, pp=pp, vpp=vpp, sp=tp > 1
                        ),
                        train=dataclasses.replace(config.train, recompute=recompute),
                        data=dataclasses.replace(config.data, pad_multiple=-(-multiple // tp) * tp),
                    )


def _divisors(value: int) -> list[int]:
    return [n for n in range(1, value + 1) if value % n == 0]
