"""Bytes that a rank exchanges in a step, by process group, and the time they take."""

from __future__ import annotations

from dataclasses import dataclass

from dattn_mcore.architectures import tower_features
from dattn_mcore.architectures.decoder import EMBEDDING
from dattn_mcore.config.checks import shards_of
from dattn_mcore.config.optim_groups import learns
from dattn_mcore.config.schema import Config
from dattn_mcore.plan.backward import DECODER, FC1, FIRST, decoder_gradients, tower_gradients
from dattn_mcore.plan.context import context_bytes, dealt_bytes, tower_ranks
from dattn_mcore.plan.flops import recomputed_layers, visual_ends
from dattn_mcore.plan.hardware import Cluster
from dattn_mcore.plan.parameters import layers_of_stage, stage_parameters
from dattn_mcore.plan.rows import Rows
from dattn_mcore.plan.state_memory import StateMemory


@dataclass(frozen=True)
class Exchange:
    """What a rank sends in a step within one group.

    Attributes:
        group: tensor, context, tiles (visual rows before the first layer), pipeline or data.
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


def tensor_bytes(config: Config, stage: int, pack: Rows) -> float:
    """Bytes that a rank of a stage sends in its tensor parallel group for one micro-batch.

    Args:
        config: a checked configuration.
        stage: pipeline stage.
        pack: rows of the micro-batch, of this context parallel rank.
    """
    tp = config.parallel.tp
    if tp == 1:
        return 0.0
    layers = [layer for chunk in layers_of_stage(config, stage) for layer in chunk]
    again = recomputed_layers(config)
    rows = sum(_layer_rows(config, pack, layer, layer in again) for layer in layers)
    e = 2 if config.train.precision == "bf16" else 4
    moved = e * config.model.llm.hidden_size * rows
    if stage == 0:
        moved += _first_bytes(config, pack)
    if stage == config.parallel.pp - 1:
        moved += _loss_bytes(config, pack)
    return moved * (tp - 1) / tp


def _layer_rows(config: Config, pack: Rows, layer: int, again: bool) -> float:
    """Rows that a layer gathers and scatters; an all-reduce counts as one of each."""
    gradients = decoder_gradients(config)[layer]
    rows = pack.text + pack.visual
    after = pack.text if visual_ends(config, layer) else rows
    asking = rows if config.attention.v2v == "causal" else pack.text
    before = {FIRST[DECODER][0]: asking, FIRST[DECODER][1]: rows, FC1: after}
    back = sum(number for name, number in before.items() if name in gradients.computed)
    if not config.parallel.sp:  # behind attention and MLP; in backward before them
        return 4 * after * (1 + again) + 2 * back
    forward = sum(before.values()) + 2 * after
    weights = sum(number for name, number in before.items() if name in gradients.weights)
    return forward * (1 + again) + back + weights + 2 * after * gradients.any


def _first_bytes(config: Config, pack: Rows) -> float:
    """Of pixels, tower, projector and embedding.

    Where each rank has tiles of its own their rows are exchanged (`context.dealt_bytes`), and
    without sequence parallelism each gets those of all.
    """
    vision, e = config.model.vision, 2 if config.train.precision == "bf16" else 4
    row = e * config.model.llm.hidden_size
    _, divided = tower_ranks(config)
    if divided == 1:
        moved = 3 * vision.image_size**2 * pack.tiles * config.parallel.tp
        moved += 0.0 if config.parallel.sp else row * pack.visual
    else:
        tower = pack.tiles * (vision.rows_per_tile + tower_features(config.model).class_row)
        learned = sum(gradients.any for gradients in tower_gradients(config))
        moved = 4 * e * vision.hidden_size * tower * (vision.layers_run + learned)
        moved += 2 * row * pack.visual  # projector
        moved += 3 * vision.image_size**2 * pack.tiles
        moved += row * pack.visual * config.parallel.sp  # gradients of visual rows
    if config.parallel.sp:
        moved += row * pack.text  # embedding
        return moved + row * pack.text * learns(config, EMBEDDING, None)
    return moved + 2 * row * pack.text


def tower_gradient_bytes(config: Config, stage: int) -> float:
    """Bytes once a step: float32 gradients of a tower that each tensor rank has whole, added up."""
    tp = config.parallel.tp
    if stage > 0 or tp == 1 or config.parallel.tower == "tensor":
        return 0.0
    return 8.0 * learned_outside(config) * (tp - 1) / tp


def learned_outside(config: Config) -> int:
    """Numbers of the tower and the projector that learn, on a rank."""
    first = stage_parameters(config, 0)[0]
    return sum(p.numel for p in first if p.trained and p.part != "llm")


def _loss_bytes(config: Config, pack: Rows) -> float:
    """Of the rows that the loss reads, and their gradients."""
    row = (2 if config.train.precision == "bf16" else 4) * config.model.llm.hidden_size
    gathered = row * pack.text if config.parallel.sp else 0.0
    return gathered + 2 * row * pack.labelled


def data_bytes(config: Config, state: StateMemory, copies: int) -> float:
    """Bytes of a reduce-scatter of float32 gradients and an all-gather of updated weights.

    Args:
        config: a checked configuration.
        state: of a rank.
        copies: ranks that hold the same weights: data times context parallel ones.
    """
    trained_bytes = state.gradients // 4 * (2 if config.train.precision == "bf16" else 4)
    return (state.gradients + trained_bytes) * (copies - 1) / copies


def data_exchange(config: Config, state: StateMemory, cluster: Cluster, copies: int) -> Exchange:
    """`data_bytes`, and their time."""
    moved = data_bytes(config, state, copies)
    bandwidth = cluster.bandwidth(copies, config.parallel.tp)
    return Exchange("data", copies, moved, moved / bandwidth)


def pipeline_bytes(config: Config, stage: int, pack: Rows, num_microbatches: int) -> float:
    """Bytes that a rank of a stage sends to the next (hidden states) and to the one before."""
    parallel = config.parallel
    e = 2 if config.train.precision == "bf16" else 4
    rows = (pack.text + pack.visual) / shards_of(config).tensor
    chunks = parallel.pp * parallel.vpp  # of the whole model: one boundary less than chunks
    own = range(stage, chunks, parallel.pp)
    sends = sum((chunk < chunks - 1) + (chunk > 0) for chunk in own) if parallel.pp > 1 else 0
    return sends * e * config.model.llm.hidden_size * rows * num_microbatches


def pipeline_exchange(
    config: Config, pack: Rows, num_microbatches: int, cluster: Cluster, copies: int
) -> Exchange:
    """`pipeline_bytes` of the stage that sends most, and their time."""
    parallel = config.parallel
    moved = max(
        pipeline_bytes(config, stage, pack, num_microbatches) for stage in range(parallel.pp)
    )
    return Exchange(
        "pipeline", parallel.pp, moved, moved / cluster.bandwidth(2, parallel.tp * copies)
    )


def context_exchanges(
    config: Config, own: Rows, pack: Rows, num_microbatches: int, cluster: Cluster
) -> tuple[Exchange, Exchange]:
    """`context_bytes` of the stage that sends most, and `dealt_bytes`; and their times."""
    parallel = config.parallel
    cp, stages = parallel.cp, range(parallel.pp)
    moved = max(context_bytes(config, stage, own) for stage in stages) * num_microbatches
    dealt = dealt_bytes(config, pack) * num_microbatches
    (ranks, divided), speed = tower_ranks(config), cluster.exchange_bandwidth(cp, parallel.tp)
    return (
        Exchange("context", cp, moved, moved / speed),
        Exchange("tiles", ranks, dealt, dealt / cluster.exchange_bandwidth(ranks, divided)),
    )


def tensor_exchange(
    config: Config, cluster: Cluster, pack: Rows, num_microbatches: int
) -> Exchange:
    """`tensor_bytes` of the stage that sends most, and their time."""
    tp, stages = config.parallel.tp, range(config.parallel.pp)
    moved = max(tensor_bytes(config, stage, pack) for stage in stages) * num_microbatches
    return Exchange("tensor", tp, moved, moved / cluster.bandwidth(tp, 1) if tp > 1 else 0.0)
