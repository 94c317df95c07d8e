"""Bytes that a rank exchanges in a step, by process group, and the time they take."""

from __future__ import annotations

from dataclasses import dataclass

from dattn_mcore.config.schema import Config
from dattn_mcore.plan.hardware import Cluster
from dattn_mcore.plan.rows import Rows
from dattn_mcore.plan.state_memory import StateMemory
from dattn_mcore.plan.workload import Step


@dataclass(frozen=True)
class Exchange:
    """What a rank sends in a step within one group.

    Attributes:
        group: tensor, pipeline or data.
        size: ranks of the group.
        bytes: a rank sends.
        seconds: they take at the group's bandwidth, before any overlap.
    """

    group: str
    size: int
    bytes: float
    seconds: float


def tensor_bytes_per_layer(config: Config, pack: Rows) -> tuple[float, float]:
    """Bytes of a layer for one micro-batch, forward and backward.

    Without sequence parallelism an all-reduce after attention and MLP; with it a reduce-scatter
    there and an all-gather before each linear, which backward repeats for weight gradients.
    """
    tp = config.parallel.tp
    if tp == 1:
        return 0.0, 0.0
    e = 2 if config.train.precision == "bf16" else 4
    row = e * config.model.llm.hidden_size * (tp - 1) / tp
    rows = pack.text + pack.visual
    if not config.parallel.sp:
        return 4 * row * rows, 4 * row * rows
    asking = rows if config.attention.v2v == "causal" else pack.text
    gathered = 2 * rows + asking  # q, keys and values, MLP
    return row * (gathered + 2 * rows), row * (gathered * 2 + 2 * rows)


def data_exchange(config: Config, state: StateMemory, cluster: Cluster, dp: int) -> Exchange:
    """Reduce-scatter of float32 gradients and all-gather of updated weights."""
    trained_bytes = state.gradients // 4 * (2 if config.train.precision == "bf16" else 4)
    moved = (state.gradients + trained_bytes) * (dp - 1) / dp
    bandwidth = cluster.bandwidth(dp, config.parallel.tp)
    return Exchange("data", dp, moved, moved / bandwidth)


def pipeline_exchange(
    config: Config, pack: Rows, num_microbatches: int, cluster: Cluster, dp: int
) -> Exchange:
    """Hidden states forward and their gradients back, for an inner stage."""
    parallel = config.parallel
    if parallel.pp == 1:
        return Exchange("pipeline", 1, 0.0, 0.0)
    e = 2 if config.train.precision == "bf16" else 4
    shards = parallel.tp if parallel.sp else 1
    rows = (pack.text + pack.visual) / shards
    moved = 2 * e * config.model.llm.hidden_size * rows * num_microbatches * parallel.vpp
    bandwidth = cluster.bandwidth(2, parallel.tp * dp)
    return Exchange("pipeline", parallel.pp, moved, moved / bandwidth)


def tensor_exchange(config: Config, cluster: Cluster, step: Step, layers: int) -> Exchange:
    """What the layers of a stage exchange, once more where they are recomputed."""
    tp = config.parallel.tp
    forward, backward = tensor_bytes_per_layer(config, step.pack)
    again = forward if config.train.recompute == "full" else 0.0
    moved = (forward + backward + again) * layers * step.num_microbatches
    return Exchange("tensor", tp, moved, moved / cluster.bandwidth(tp, 1) if tp > 1 else 0.0)
