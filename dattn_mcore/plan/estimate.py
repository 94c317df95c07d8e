"""Puts memory, operations and communication of a layout together into a step time.

The model of a step: products at the rate large ones sustain in training, attention at published
rates of flash-attention 3, elementwise kernels at the memory's bandwidth; the slowest stage sets
the pace of the pipeline; communication that nothing hides is added.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from dattn_mcore.config.checks import check_config, data_parallel_size
from dattn_mcore.config.schema import Config
from dattn_mcore.plan import hardware
from dattn_mcore.plan.activations import WorkingMemory, working_memory
from dattn_mcore.plan.communication import (
    Exchange,
    data_exchange,
    pipeline_exchange,
    tensor_bytes_per_layer,
)
from dattn_mcore.plan.flops import Rows, step_work
from dattn_mcore.plan.hardware import Cluster, Gpu
from dattn_mcore.plan.parameters import layers_of_stage
from dattn_mcore.plan.state_memory import StateMemory, optimizer_bytes, state_memory
from dattn_mcore.plan.workload import Sample, Step, step_of

KERNELS = 30, 50  # of a layer, forward and backward: what the host must start


@dataclass(frozen=True)
class StageMemory:
    """Bytes on a rank of a stage."""

    stage: int
    state: StateMemory
    working: WorkingMemory

    @property
    def total(self) -> float:
        """All parts."""
        state, working = self.state, self.working
        parts = state.weights + state.gradients + state.optimizer
        return parts + sum(dataclasses.astuple(working))


@dataclass(frozen=True)
class Plan:
    """What a layout needs and does, on one kind of GPU in one precision.

    Attributes:
        config: with the layout.
        cluster: GPUs in nodes.
        gpu: their kind.
        fp8: linears of the language model in FP8, the rest in train.precision.
        dp: data parallel size.
        step: rows and micro-batches.
        memory: of each stage's ranks.
        flops: of a step by part, over all GPUs, without recompute.
        exchanges: of the rank that exchanges most, by group.
        bubble: share of the pipeline's time in which the slowest stage waits.
        seconds: of a step.
        exposed_seconds: of them, communication that nothing hides.
    """

    config: Config
    cluster: Cluster
    gpu: Gpu
    fp8: bool
    dp: int
    step: Step
    memory: tuple[StageMemory, ...]
    flops: dict[str, float]
    exchanges: tuple[Exchange, ...]
    bubble: float
    seconds: float
    exposed_seconds: float

    @property
    def worst(self) -> StageMemory:
        """The stage that needs most memory."""
        return max(self.memory, key=lambda stage: stage.total)

    @property
    def fits(self) -> bool:
        """Whether every rank's memory suffices."""
        return self.worst.total <= hardware.USABLE * self.gpu.memory

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Text and visual rows."""
        rows = self.step.rows
        return (rows.text + rows.visual) / self.seconds / self.cluster.world_size

    @property
    def tflops_per_gpu(self) -> float:
        """Model FLOPs a second and GPU, in 1e12."""
        return sum(self.flops.values()) / self.seconds / self.cluster.world_size / 1e12

    @property
    def mfu(self) -> float:
        """Of the peak of the precision in which the linears run."""
        return self.tflops_per_gpu * 1e12 / self.gpu.peak["fp8" if self.fp8 else "bf16"]

    def days(self, num_samples: int | None) -> float | None:
        """Of the whole run; None where the number of samples is not known."""
        train = self.config.train
        steps = train.steps
        if steps is None:
            if num_samples is None:
                return None
            steps = max(1, math.ceil(num_samples * train.epochs / train.global_batch_size))
        return steps * self.seconds / 86400


@dataclass(frozen=True)
class _StageTime:
    """Seconds of one micro-batch."""

    forward: float
    backward: float
    exposed: float  # part of both: tensor parallel communication that nothing hides


def make_plan(config: Config, cluster: Cluster, gpu: Gpu, fp8: bool, sample: Sample) -> Plan:
    """Plans one layout.

    Raises:
        ConfigError: the layout breaks a rule, or the sample fits no micro-batch.
    """
    check_config(config)
    dp = data_parallel_size(config, cluster.world_size)
    step = step_of(config, sample, dp)
    parallel, m = config.parallel, step.num_microbatches
    stages = range(parallel.pp)
    counts = [sum(map(len, layers_of_stage(config, stage))) for stage in stages]
    memory = tuple(
        StageMemory(
            stage,
            state_memory(config, stage, dp),
            working_memory(config, stage, counts[stage], step.pack, m, fp8),
        )
        for stage in stages
    )
    times = [_stage_time(config, cluster, gpu, fp8, step.pack, s, counts[s]) for s in stages]
    slowest = max(times, key=lambda time: time.forward + time.backward)
    between = pipeline_exchange(config, step.pack, m, cluster, dp)
    waiting = (parallel.pp - 1) / parallel.vpp
    hops = between.seconds / m if parallel.vpp == 1 else 0.0  # interleaving overlaps them
    pipeline = (slowest.forward + slowest.backward + hops) * (m + waiting)
    data = [data_exchange(config, stage.state, cluster, dp) for stage in memory]
    exposed = max(
        _exposed_data(config, exchange, stage.state, times[stage.stage])
        for exchange, stage in zip(data, memory, strict=True)
    )
    update = max(_update_seconds(config, stage, dp, gpu) for stage in stages)
    seconds = pipeline + exposed + update
    return Plan(
        config=config,
        cluster=cluster,
        gpu=gpu,
        fp8=fp8,
        dp=dp,
        step=step,
        memory=memory,
        flops={name: work.total for name, work in step_work(config, step.rows).items()},
        exchanges=(
            _tensor_exchange(config, cluster, step, max(counts)),
            between,
            max(data, key=lambda exchange: exchange.bytes),
        ),
        bubble=waiting / (m + waiting),
        seconds=seconds,
        exposed_seconds=exposed + hops * (m + waiting) + slowest.exposed * (m + waiting),
    )


def _stage_time(
    config: Config,
    cluster: Cluster,
    gpu: Gpu,
    fp8: bool,
    pack: Rows,
    stage: int,
    num_layers: int,
) -> _StageTime:
    llm, tp, pp = config.model.llm, config.parallel.tp, config.parallel.pp
    pack = dataclasses.replace(pack, packs=1.0)
    work = step_work(config, pack)
    share = num_layers / llm.num_layers
    linears = (work["text"] + work["visual"]) * (share / tp)
    gemm = gpu.gemm["fp8" if fp8 and config.train.precision == "bf16" else "bf16"]
    keys = pack.text_pairs / pack.text if pack.text else 0.0
    attend, attend_back = hardware.attention_rates(llm.head_dim, keys)
    attention = work["attention"] * (share / tp)
    moved = _moved_bytes(config, pack, fp8) * num_layers / gpu.bandwidth
    forward = linears.forward / gemm + attention.forward / attend + moved / 3
    # Backward of flash attention computes five products for the forward's two.
    backward = (linears.inputs + linears.weights) / gemm + 2 * moved / 3
    backward += 2.5 * attention.forward / attend_back if attention.inputs else 0.0
    forward = max(forward, KERNELS[0] * hardware.LAUNCH_SECONDS * num_layers)
    backward = max(backward, KERNELS[1] * hardware.LAUNCH_SECONDS * num_layers)
    sent, sent_back = tensor_bytes_per_layer(config, pack)
    visible = 1.0 - (hardware.HIDDEN if config.parallel.tp_comm_overlap else 0.0)
    speed = cluster.bandwidth(tp, 1) / (visible * num_layers)
    exposed, exposed_back = sent / speed, sent_back / speed
    if config.train.recompute == "full":
        few = config.train.recompute_layers
        again = 1.0 if few is None else min(few, num_layers) / num_layers
        backward += again * forward
        exposed_back += again * exposed
    for name, where in (("tower", 0), ("projector", 0), ("head", pp - 1)):
        if stage == where:
            part = work[name] * (1 / tp)
            forward += part.forward / gpu.gemm["bf16"]
            backward += (part.inputs + part.weights) / gpu.gemm["bf16"]
    if stage == 0:
        forward += _tower_bytes(config, pack) / gpu.bandwidth
    if stage == pp - 1:
        backward += work["head"].forward / tp / gpu.gemm["bf16"]  # the chunked loss' second time
        # Logits: written and read in bf16 once, in float32 about four times.
        backward += pack.labelled * llm.padded_vocab_size / tp * 20 / gpu.bandwidth
    return _StageTime(forward + exposed, backward + exposed_back, exposed + exposed_back)


def _moved_bytes(config: Config, pack: Rows, fp8: bool) -> float:
    """Memory traffic of a layer's elementwise kernels (fused), forward and backward."""
    llm, tp = config.model.llm, config.parallel.tp
    e = 2 if config.train.precision == "bf16" else 4
    shards = tp if config.parallel.sp else 1
    h, f = llm.hidden_size, llm.ffn_hidden_size / tp
    query = llm.num_attention_heads * llm.head_dim / tp
    keys_values = 2 * llm.num_query_groups * llm.head_dim / tp
    norms = (4 if llm.post_norms else 2) * 5 * h / shards  # in, out; in, gradient, out
    per_row = norms + 10 * h / shards + 8 * f  # two residuals; gated activation
    total = e * ((pack.text + pack.visual) * per_row + pack.text * 4 * (query + keys_values / 2))
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
    layers = vision.num_layers + 1 + vision.select_layer
    per_row = 10 * vision.hidden_size + 3 * vision.ffn_hidden_size / config.parallel.tp
    return e * rows * layers * per_row


def _tensor_exchange(config: Config, cluster: Cluster, step: Step, layers: int) -> Exchange:
    tp = config.parallel.tp
    forward, backward = tensor_bytes_per_layer(config, step.pack)
    again = forward if config.train.recompute == "full" else 0.0
    moved = (forward + backward + again) * layers * step.num_microbatches
    return Exchange("tensor", tp, moved, moved / cluster.bandwidth(tp, 1) if tp > 1 else 0.0)


def _exposed_data(
    config: Config, exchange: Exchange, state: StateMemory, time: _StageTime
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


def _update_seconds(config: Config, stage: int, dp: int, gpu: Gpu) -> float:
    """Adam on a rank's share, and the norm of all its gradients."""
    state = state_memory(config, stage, dp)
    per_element = 12 if config.train.precision == "bf16" else 8
    owned = max(optimizer_bytes(config, stage, dp)) / per_element
    return (owned * 30 + 2 * state.gradients) / gpu.bandwidth


def as_dict(plan: Plan, num_samples: int | None) -> dict[str, Any]:
    """The plan for programs: bytes, seconds, operations."""
    parallel = plan.config.parallel
    return {
        "layout": {
            **{name: getattr(parallel, name) for name in ("tp", "pp", "vpp", "sp")},
            "dp": plan.dp,
            "recompute": plan.config.train.recompute,
        },
        "gpu": plan.gpu.name,
        "precision": "fp8" if plan.fp8 else plan.config.train.precision,
        "fits": plan.fits,
        "micro_batches": plan.step.num_microbatches,
        "rows_per_micro_batch": {"text": plan.step.pack.text, "visual": plan.step.pack.visual},
        "memory_bytes": [
            {
                "stage": stage.stage,
                **dataclasses.asdict(stage.state),
                **dataclasses.asdict(stage.working),
                "total": stage.total,
            }
            for stage in plan.memory
        ],
        "flops_per_step": {**plan.flops, "total": sum(plan.flops.values())},
        "communication": [dataclasses.asdict(exchange) for exchange in plan.exchanges],
        "pipeline_bubble": plan.bubble,
        "seconds_per_step": plan.seconds,
        "exposed_communication_seconds": plan.exposed_seconds,
        "tokens_per_second_per_gpu": plan.tokens_per_second_per_gpu,
        "tflops_per_gpu": plan.tflops_per_gpu,
        "mfu": plan.mfu,
        "days": plan.days(num_samples),
    }
