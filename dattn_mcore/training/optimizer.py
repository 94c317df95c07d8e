"""Megatron-Core's DDP, distributed optimizer and schedule, from the run's configuration."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection

from dattn_mcore.config.schema import Config
from dattn_mcore.models.dattn import DattnModel
from dattn_mcore.training.not_finite import NotFiniteError
from dattn_mcore.training.runtime import params_dtype


def wrap_ddp(
    chunks: list[DattnModel], config: Config, pg_collection: ProcessGroupCollection
) -> list[DistributedDataParallel]:
    """Gives each chunk its gradient buffers, reduced over data parallel ranks in float32."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=config.parallel.overlap_grad_reduce,
        overlap_param_gather=config.parallel.overlap_param_gather,
        use_distributed_optimizer=True,
        check_for_nan_in_grad=False,  # the step stops on what is not finite
    )
    return [
        DistributedDataParallel(
            config=chunk.config, ddp_config=ddp_config, module=chunk, pg_collection=pg_collection
        )
        for chunk in chunks
    ]


@contextlib.contextmanager
def gathered_weights(model: list[DistributedDataParallel], config: Config) -> Iterator[None]:
    """Every rank holds all updated weights inside; with overlap they come only as forward asks."""
    overlapped = config.parallel.overlap_param_gather
    if overlapped:
        for chunk in model:
            chunk.disable_forward_pre_hook(param_sync=True)
    yield
    if overlapped:
        for chunk in model:
            chunk.enable_forward_pre_hook()


def build_optimizer(config: Config, model: list[DistributedDataParallel]) -> MegatronOptimizer:
    """AdamW, sharded over data parallel ranks, with a peak learning rate per part."""
    optim = config.optim
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.lr * optim.min_lr_ratio,
        weight_decay=optim.weight_decay,
        adam_beta1=optim.beta1,
        adam_beta2=optim.beta2,
        adam_eps=optim.eps,
        clip_grad=optim.clip_grad,
        bf16=config.train.precision == "bf16",
        params_dtype=params_dtype(config),
        use_distributed_optimizer=True,
        overlap_param_gather=config.parallel.overlap_param_gather,
    )
    overrides: dict[Any, Any] = {
        ParamKey(name=("*.bias", "*norm.weight", "*class_embedding")): {"wd_mult": 0.0},
    }
    if config.train.precision == "bf16":
        # The axis positions stay float32. Megatron-Core's distributed optimizer mixes up states
        # where one group holds both dtypes, so they get groups of their own; the field tells
        # groups apart and has no other effect.
        full_precision = ParamPredicate("float32", lambda p: p.dtype is torch.float32)
        overrides[ParamKey(predicate=full_precision)] = {"is_decoupled_lr": True}
    for part, peak in (("projector", optim.lr_projector), ("vision", optim.lr_vision)):
        if peak is not None and peak != optim.lr:
            overrides[ParamKey(name=f"*{part}.*")] = {
                "max_lr": peak,
                "min_lr": peak * optim.min_lr_ratio,
                # Not used as a factor, but Megatron-Core tells groups apart by it on a resume.
                "lr_mult": peak / optim.lr,
            }
    optimizer = get_megatron_optimizer(optimizer_config, model, config_overrides=overrides)
    _refuse_gradients_that_are_not_finite(optimizer)
    chunk_config = model[0].config
    chunk_config.finalize_model_grads_func = finalize_model_grads
    chunk_config.grad_scale_func = optimizer.scale_loss
    chunk_config.no_sync_func = [chunk.no_sync for chunk in model]
    if len(model) == 1:
        chunk_config.no_sync_func = model[0].no_sync
    return optimizer


def _refuse_gradients_that_are_not_finite(optimizer: MegatronOptimizer) -> None:
    """Makes `step` raise before it updates, on every rank: the norm is one over all ranks."""
    get_grad_norm = optimizer.get_grad_norm

    def finite_grad_norm() -> float:
        norm = float(get_grad_norm())
        if not math.isfinite(norm):
            raise NotFiniteError("gradient norm", norm)
        return norm

    optimizer.get_grad_norm = finite_grad_norm


def build_scheduler(
    config: Config, optimizer: MegatronOptimizer, total_steps: int
) -> OptimizerParamScheduler:
    """Cosine decay to `min_lr_ratio` after a linear warm-up, counted in optimizer steps.

    Of N steps with a warm-up of w, step i (from 1) has the rate peak x i / w up to step w, and the
    minimum is reached after the last step, where step N + 1 would be. So no step has rate 0: a
    step of rate 0 learns nothing. Without a warm-up the first step has the peak.

    Returns:
        Megatron-Core's scheduler, with the rates of the first step set; `step(1)` after each step.
    """
    optim = config.optim
    warmup = min(max(round(optim.warmup_ratio * total_steps), 1), total_steps)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.lr * optim.min_lr_ratio,
        lr_warmup_steps=warmup,
        lr_decay_steps=total_steps + 1,
        lr_decay_style="cosine",
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    scheduler.step(1)  # Megatron-Core counts steps that are done; its rate of 0 steps is 0
    return scheduler
