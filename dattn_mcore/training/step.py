"""One optimizer step: Megatron-Core's forward-backward schedule, then the optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.utils import is_pp_last_stage
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_pg_rank

from dattn_mcore.models.dattn import ModelInputs
from dattn_mcore.parallel.out_of_memory import is_out_of_memory
from dattn_mcore.training.memory import Begun, StepMemoryError
from dattn_mcore.training.not_finite import NotFiniteError
from dattn_mcore.types import IGNORED_LABEL


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did.

    Attributes:
        loss: mean over the supervised tokens of the global batch, by the weights of their samples;
            None where it has none, and the model's weights stay as they are.
        grad_norm: L2 norm over all trained parameters before clipping; None likewise.
        supervised_tokens: tokens with a loss in the global batch.
        model_flops: operations of the global batch, forward and backward, without recompute.
        rates: the learning rate that was used, by the peak rate of the parameters it holds for.
        by_group: float64 [groups, 3], on every rank: weighted sum of losses, count and sum of
            weights of the supervised tokens of each group of samples (`ModelInputs.groups`); None
            where they have none.
    """

    loss: float | None
    grad_norm: float | None
    supervised_tokens: int
    model_flops: float
    rates: dict[float, float]
    by_group: torch.Tensor | None = None


def _loss_sum(
    inputs: ModelInputs, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Sums and count, so that the mean does not depend on how samples are split into packs."""
    count = (inputs.labels != IGNORED_LABEL).sum()
    weights = inputs.weights
    if weights is not None and weights.numel():  # without a label there is one loss of no row
        losses = losses * weights
    total = losses.sum()
    of_weights = count if weights is None else weights.double().sum()
    report = torch.stack([total.detach().double(), count.double(), of_weights.double()])[None]
    if inputs.groups is not None:
        by_group = report.new_zeros(inputs.num_groups, 3)
        if inputs.groups.numel():
            ones = torch.ones_like(losses)
            counted = ones if weights is None else weights
            rows = torch.stack([losses.detach().double(), ones.double(), counted.double()], dim=1)
            by_group.index_add_(0, inputs.groups, rows)
        report = torch.cat([report, by_group])
    return total, count.int(), {"sums": report}


def forward_step(
    inputs: Iterator[ModelInputs], model: torch.nn.Module
) -> tuple[torch.Tensor, partial]:
    """Megatron-Core's forward step: next micro-batch through one model chunk."""
    micro_batch = next(inputs)
    return model(micro_batch), partial(_loss_sum, micro_batch)


def train_step(
    model: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    micro_batches: list[ModelInputs],
    pg_collection: ProcessGroupCollection,
    model_flops: float = 0.0,
) -> StepResult:
    """Runs one global batch through the pipeline and updates the weights.

    Without a supervised token there is nothing to learn: the update is left out, because Adam's
    momentum would move the weights all the same.

    Args:
        model: this stage's chunks.
        optimizer: Megatron-Core's optimizer.
        scheduler: has set the rates of this step; advanced by one, to those of the next.
        micro_batches: this replica's packs.
        pg_collection: process groups.
        model_flops: operations of these packs.

    Raises:
        NotFiniteError: loss or gradient norm; raised on every rank, before the update.
        StepMemoryError: an allocation failed; raised on this rank alone.
    """
    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    reports = run_schedule(model, micro_batches, pg_collection, forward_only=False)
    if get_pg_rank(pg_collection.cp):
        model_flops = 0.0  # the first rank speaks for the whole pack
    sums, flops = sum_reports(reports, micro_batches[0], model_flops)
    supervised = int(sums[0, 1])
    by_group = sums[1:].cpu() if len(sums) > 1 else None
    rates = {group.get("max_lr", scheduler.max_lr): group["lr"] for group in optimizer.param_groups}
    if not supervised:
        scheduler.step(1)
        return StepResult(None, None, 0, flops, rates, by_group)
    loss = float(sums[0, 0] / sums[0, 2])
    if not math.isfinite(loss):
        packs = tuple(i for i, report in enumerate(reports) if not report[0, 0].isfinite())
        raise NotFiniteError("loss", loss, packs)
    if sums[0, 2] != sums[0, 1]:
        # The schedule divided by the count of tokens, which is a whole number there.
        for chunk in model:
            chunk.scale_gradients(float(sums[0, 1] / sums[0, 2]))
    try:
        _, grad_norm, _ = optimizer.step()
    except Exception as error:
        if is_out_of_memory(error):
            raise StepMemoryError.of(error, None) from error
        raise
    scheduler.step(1)
    return StepResult(loss, float(grad_norm or 0.0), supervised, flops, rates, by_group)


def run_schedule(
    model: list[DistributedDataParallel],
    micro_batches: list[ModelInputs],
    pg_collection: ProcessGroupCollection,
    forward_only: bool,
) -> list[torch.Tensor]:
    """Forward (and backward) over all micro-batches.

    Returns:
        For each micro-batch float64 [1 + groups, 3]: weighted sum of losses, count and sum of
        weights of supervised tokens, of all its rows and of those of each group. Empty but on the
        first tensor rank of the last stage, so that a sum over ranks counts each once; context
        parallel ranks have rows of their own.
    """
    begun = [Begun(micro_batches) for _ in model]
    params = micro_batches[0].params
    iterators: Any = begun
    single = len(model) == 1
    try:
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators[0] if single else iterators,
            model=model[0] if single else model,
            num_microbatches=len(micro_batches),
            # Of the tensor between stages; the micro-batches of a step have one shape. These are
            # rows of one context parallel rank, by whose number Megatron-Core divides.
            seq_length=(params.num_visual + params.num_text) * pg_collection.cp.size(),
            micro_batch_size=1,
            forward_only=forward_only,
        )
    except Exception as error:
        if is_out_of_memory(error):
            pack = max(packs.count for packs in begun) - 1
            raise StepMemoryError.of(error, max(pack, 0)) from error
        raise
    if is_pp_last_stage(pg_collection.pp) and get_pg_rank(pg_collection.tp) == 0:
        return [report["sums"] for report in reports]
    return []


def sum_reports(
    reports: list[torch.Tensor], like: ModelInputs, model_flops: float = 0.0
) -> tuple[torch.Tensor, float]:
    """Adds up what `run_schedule` returned, over all ranks of the run.

    Args:
        reports: from it.
        like: one of its micro-batches.
        model_flops: operations of this replica's packs.

    Returns:
        float64 [1 + groups, 3], losses, supervised tokens and their weights; and operations.
    """
    size = 1 + (like.num_groups if like.groups is not None else 0)
    sums = torch.zeros(3 * size + 1, dtype=torch.float64, device=like.labels.device)
    for report in reports:
        sums[:-1] += report.flatten()
    if reports:  # one rank of a replica speaks for it
        sums[-1] = model_flops
    dist.all_reduce(sums)
    return sums[:-1].view(size, 3), float(sums[-1])
