"""How long a stage takes for a micro-batch, and a rank for what comes after the pipeline."""

from __future__ import annotations

from dataclasses import dataclass

from dattn_mcore.architectures import text_features, tower_features
from dattn_mcore.config.checks import shards_of
from dattn_mcore.config.schema import Config
from dattn_mcore.plan import hardware
from dattn_mcore.plan.communication import Exchange, tensor_bytes_per_layer
from dattn_mcore.plan.context import context_bytes, dealt_bytes, rank_rows, rings, tower_ranks
from dattn_mcore.plan.flops import Work
from dattn_mcore.plan.hardware import Cluster, Gpu
from dattn_mcore.plan.rows import Rows
from dattn_mcore.plan.state_memory import StateMemory

KERNELS = 30, 50  # of a layer, forward and backward: what the host must start


@dataclass(frozen=True)
class StageTime:
    """Seconds of one micro-batch."""

    forward: float
    backward: float
    exposed: float  # part of both: tensor and context parallel communication that nothing hides


def stage_time(
    config: Config,
    cluster: Cluster,
    gpu: Gpu,
    fp8: bool,
    whole: Rows,
    work: dict[str, Work],
    stage: int,
    num_layers: int,
) -> StageTime:
    """Time of a stage for one micro-batch.

    Args:
        config: with the layout.
        cluster: GPUs in nodes.
        gpu: their kind.
        fp8: linears of the language model in FP8.
        whole: rows of the micro-batch, of all context parallel ranks.
        work: operations of one such rank's rows by part, of the whole model.
        stage: pipeline stage, from 0.
        num_layers: layers of the language model in the stage.
    """
    llm, tp, pack = config.model.llm, config.parallel.tp, rank_rows(config, whole)
    share = num_layers / llm.num_layers
    linears = (work["text"] + work["visual"]) * (share / tp)
    attention = work["attention"] * (share / tp)
    gemm = gpu.gemm["fp8" if fp8 and config.train.precision == "bf16" else "bf16"]
    # Of all queries a rank computes, where its visual rows answer those of other ranks.
    keys = pack.text_pairs / whole.text if whole.text else 0.0
    attend, attend_back = hardware.attention_rates(llm.head_dim, keys)
    moved = _moved_bytes(config, pack, fp8) * num_layers / gpu.bandwidth
    forward = linears.forward / gemm + attention.forward / attend + moved / 3
    # Backward of flash attention computes five products for the forward's two.
    backward = (linears.inputs + linears.weights) / gemm + 2 * moved / 3
    backward += 2.5 * attention.forward / attend_back
    forward = max(forward, KERNELS[0] * hardware.LAUNCH_SECONDS * num_layers)
    backward = max(backward, KERNELS[1] * hardware.LAUNCH_SECONDS * num_layers)
    again = linears.again / linears.forward  # elementwise kernels and exchanges come with them
    backward += linears.again / gemm + again * moved / 3
    backward += (attention.again - attention.forward / 2) / attend
    sent, sent_back = tensor_bytes_per_layer(config, pack)
    visible = 1.0 - (hardware.HIDDEN if config.parallel.tp_comm_overlap else 0.0)
    speed = cluster.bandwidth(tp, 1) / (visible * num_layers)
    exposed, exposed_back = sent / speed, (sent_back + again * sent) / speed
    waits = _context_seconds(config, cluster, pack, whole, stage)
    if rings(config):  # keys and values of the next rank come while those of one are read
        hidden = attention.forward / attend + 2.5 * attention.forward / attend_back
        waits = max(waits - hidden, 0.0)
    exposed_back += waits
    for name, part in _ends(config, stage, work):
        divided = tp if name == "head" else tower_ranks(config)[1]
        forward += part.forward / divided / gpu.gemm["bf16"]
        backward += (part.inputs + part.weights + part.again) / divided / gpu.gemm["bf16"]
        if name == "tower":
            forward += _tower_bytes(config, pack) / gpu.bandwidth
        if name == "head":
            # Logits: written and read in bf16 once, in float32 about four times.
            backward += pack.labelled * llm.padded_vocab_size / tp * 20 / gpu.bandwidth
    return StageTime(forward + exposed, backward + exposed_back, exposed + exposed_back)


def _context_seconds(config: Config, cluster: Cluster, own: Rows, whole: Rows, stage: int) -> float:
    """What a rank sends for attention over context ranks and for its tiles, and back."""
    parallel = config.parallel
    seconds = context_bytes(config, stage, own)
    seconds /= cluster.exchange_bandwidth(parallel.cp, parallel.tp)
    if stage == 0:
        seconds += dealt_bytes(config, whole) / cluster.exchange_bandwidth(*tower_ranks(config))
    return seconds


def _ends(config: Config, stage: int, work: dict[str, Work]) -> list[tuple[str, Work]]:
    """What the first and the last stage have beside layers."""
    first, last = stage == 0, stage == config.parallel.pp - 1
    names = ("tower", "projector") * first + ("head",) * last
    return [(name, work[name]) for name in names]


def _moved_bytes(config: Config, pack: Rows, fp8: bool) -> float:
    """Memory traffic of a layer's elementwise kernels (fused), forward and backward."""
    llm, tp = config.model.llm, config.parallel.tp
    e = 2 if config.train.precision == "bf16" else 4
    shards = shards_of(config).tensor
    h, f = llm.hidden_size, llm.ffn_hidden_size / tp
    query = llm.num_attention_heads * llm.head_dim / tp
    keys_values = 2 * llm.groups_per_rank(tp) * llm.head_dim
    norms = text_features(config.model).norms.number * 5 * h / shards  # in, out; in, gradient, out
    per_row = norms + 10 * h / shards + 8 * f  # two residuals; gated activation
    total = e * ((pack.text + pack.visual) * per_row + pack.text * 4 * (query + keys_values / 2))
    if config.parallel.cp > 1 and not rings(config):
        # Gathered queries, keys and values, and outputs of all ranks: written, read and put in
        # order; backward as much twice.
        total += 3 * e * 3 * config.parallel.cp * pack.text * (2 * query + keys_values)
    if fp8:
        # Read twice in bf16 (maximum, cast), written twice in FP8 (both ways round).
        inputs = 2 * h + query + f
        gradients = query + keys_values + 2 * h + 2 * f
        total += 6 * (pack.text + pack.visual) * (inputs + gradients)
    return total


def _tower_bytes(config: Config, pack: Rows) -> float:
    vision = config.model.vision
    e = 2 if config.train.precision == "bf16" else 4
    rows = pack.tiles * vision.rows_per_tile
    layers = vision.layers_run
    # Written by the first linear, read by the activation, and what that writes.
    mlp = 5 if tower_features(config.model).gated_mlp else 3
    per_row = 10 * vision.hidden_size + mlp * vision.ffn_hidden_size / tower_ranks(config)[1]
    return e * rows * layers * per_row


def exposed_seconds(
    config: Config, exchange: Exchange, state: StateMemory, time: StageTime
) -> float:
    """Data parallel communication that no computation hides.

    Gradients go while the last micro-batch's backward pass runs, weights come while the first
    one's forward pass runs; a tenth is left over in any case.
    """
    if exchange.size == 1 or not state.trained:
        return 0.0
    weights = (2 if config.train.precision == "bf16" else 4) * state.gradients / 4
    gradient_share = state.gradients / (state.gradients + weights)
    reduce, gather = (
        exchange.seconds * gradient_share,
        exchange.seconds * (1 - gradient_share),
    )
    if config.parallel.overlap_grad_reduce:
        reduce = max(reduce - time.backward, 0.1 * reduce)
    if config.parallel.overlap_param_gather:
        gather = max(gather - time.forward, 0.1 * gather)
    return reduce + gather


def update_seconds(config: Config, state: StateMemory, gpu: Gpu) -> float:
    """Adam on a rank's share, and the norm of all its gradients."""
    owned = state.optimizer / (12 if config.train.precision == "bf16" else 8)
    return (owned * 30 + 2 * state.gradients) / gpu.bandwidth
