"""Puts memory, operations and communication of a layout together into a step time.

The model of a step: products at the rate large ones sustain in training, attention at published
rates of flash-attention 3, elementwise kernels at the memory's bandwidth; the slowest stage sets
the pace of the pipeline; communication that nothing hides is added. Context parallel exchanges of
D-Attn are counted in full; those of ring attention as hidden as far as its attention takes.
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
    context_exchanges,
    data_exchange,
    pipeline_exchange,
    tensor_exchange,
    tower_gradient_bytes,
)
from dattn_mcore.plan.context import rank_rows
from dattn_mcore.plan.flops import step_work
from dattn_mcore.plan.hardware import Cluster, Gpu
from dattn_mcore.plan.parameters import layers_of_stage
from dattn_mcore.plan.state_memory import StateMemory, state_memory
from dattn_mcore.plan.step_time import exposed_seconds, stage_time, update_seconds
from dattn_mcore.plan.workload import DataSize, Sample, Step, step_of


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

    def days(self, data: DataSize) -> float | None:
        """Of the whole run; None where the number of samples is not known."""
        train = self.config.train
        steps = train.steps or data.steps
        if steps is None:
            if data.samples is None:
                return None
            steps = max(1, math.ceil(data.samples * train.epochs / self.step.samples))
        return steps * self.seconds / 86400

    def days_are_about(self, data: DataSize) -> bool:
        """Whether the samples of a step, and so its days, depend on lengths not known here."""
        multiple = self.config.data.step_packs_multiple
        return self.config.train.steps is None and data.steps is None and multiple is not None


def make_plan(config: Config, cluster: Cluster, gpu: Gpu, fp8: bool, sample: Sample) -> Plan:
    """Plans one layout.

    Raises:
        ConfigError: the layout breaks a rule, or the sample fits no micro-batch.
    """
    check_config(config)
    return plan_unchecked(config, cluster, gpu, fp8, sample)


def plan_unchecked(config: Config, cluster: Cluster, gpu: Gpu, fp8: bool, sample: Sample) -> Plan:
    """The same of a layout that no run has: ring attention of the baseline, for comparison.

    Args:
        config: one that is checked, but for `attention.v2v=causal` with `parallel.cp`.
        cluster: GPUs in nodes.
        gpu: their kind.
        fp8: linears of the language model in FP8.
        sample: the average sample.

    Raises:
        ConfigError: the layout does not divide the cluster, or the sample fits no micro-batch.
    """
    dp = data_parallel_size(config, cluster.world_size)
    step = step_of(config, sample, dp)
    parallel, m = config.parallel, step.num_microbatches
    own, copies = rank_rows(config, step.pack), dp * parallel.cp
    stages = range(parallel.pp)
    counts = [sum(map(len, layers_of_stage(config, stage))) for stage in stages]
    memory = tuple(
        StageMemory(
            stage,
            state_memory(config, stage, copies),
            working_memory(config, stage, own, m, fp8),
        )
        for stage in stages
    )
    work = step_work(config, own)
    times = [
        stage_time(config, cluster, gpu, fp8, step.pack, work, stage, counts[stage])
        for stage in stages
    ]
    slowest = max(times, key=lambda time: time.forward + time.backward)
    between = pipeline_exchange(config, own, m, cluster, copies)
    waiting = (parallel.pp - 1) / parallel.vpp
    hops = between.seconds / m if parallel.vpp == 1 else 0.0  # interleaving overlaps them
    pipeline = (slowest.forward + slowest.backward + hops) * (m + waiting)
    data = [data_exchange(config, stage.state, cluster, copies) for stage in memory]
    exposed = max(
        exposed_seconds(config, exchange, stage.state, times[stage.stage])
        for exchange, stage in zip(data, memory, strict=True)
    )
    update = max(update_seconds(config, stage.state, gpu) for stage in memory)
    exposed += tower_gradient_bytes(config, 0) / cluster.bandwidth(parallel.tp, 1)
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
            tensor_exchange(config, cluster, own, m),
            *context_exchanges(config, own, step.pack, m, cluster),
            between,
            max(data, key=lambda exchange: exchange.bytes),
        ),
        bubble=waiting / (m + waiting),
        seconds=seconds,
        exposed_seconds=exposed + hops * (m + waiting) + slowest.exposed * (m + waiting),
    )


def as_dict(plan: Plan, data: DataSize) -> dict[str, Any]:
    """The plan for programs: bytes, seconds, operations."""
    parallel = plan.config.parallel
    return {
        "layout": {
            **{name: getattr(parallel, name) for name in ("tp", "cp", "pp", "vpp", "sp")},
            "dp": plan.dp,
            "recompute": plan.config.train.recompute,
            "recompute_layers": plan.config.train.recompute_layers,
        },
        "gpu": plan.gpu.name,
        "precision": "fp8" if plan.fp8 else plan.config.train.precision,
        "fits": plan.fits,
        "samples_per_step": plan.step.samples,
        "micro_batches": plan.step.num_microbatches,
        "micro_batches_are_full": plan.step.fill,
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
        "days": plan.days(data),
        "days_are_about": plan.days_are_about(data),
    }
