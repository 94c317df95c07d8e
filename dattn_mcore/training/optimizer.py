"""Megatron-Core's DDP and distributed optimizer, from the run's configuration."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.process_groups_config import ProcessGroupCollection

from dattn_mcore.architectures.patterns import key_and_layer
from dattn_mcore.config.optim_groups import NO_DECAY, resolved, settings_of
from dattn_mcore.config.schedule import peak_ratio
from dattn_mcore.config.schema import Config
from dattn_mcore.models.dattn import DattnModel
from dattn_mcore.parallel import platform
from dattn_mcore.parallel.fewer_passes import adam_in_one_pass
from dattn_mcore.training.model import first_layer
from dattn_mcore.training.not_finite import NotFiniteError
from dattn_mcore.training.runtime import params_dtype
from dattn_mcore.training.tower_gradients import sum_gradients


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
    """AdamW, sharded over data parallel ranks, with the settings of `config.optim_groups`."""
    optim = config.optim
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=optim.lr,
        min_lr=optim.lr * peak_ratio(optim),
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
        ParamKey(name=tuple(f"*{end}" for end in NO_DECAY)): {"wd_mult": 0.0},
        **_own_settings(config, model),
    }
    if config.train.precision == "bf16":
        # The axis positions stay float32. Megatron-Core's distributed optimizer mixes up states
        # where one group holds both dtypes, so they get groups of their own; the field tells
        # groups apart and has no other effect.
        full_precision = ParamPredicate("float32", lambda p: p.dtype is torch.float32)
        overrides[ParamKey(predicate=full_precision)] = {"is_decoupled_lr": True}
    optimizer = get_megatron_optimizer(
        optimizer_config,
        model,
        config_overrides=overrides,
        **platform.settings_of_optimizer(),
    )
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        adam_in_one_pass(part.optimizer)
    _refuse_gradients_that_are_not_finite(optimizer)
    chunk_config = model[0].config
    chunk_config.finalize_model_grads_func = finalize_gradients
    chunk_config.grad_scale_func = optimizer.scale_loss
    chunk_config.no_sync_func = [chunk.no_sync for chunk in model]
    if len(model) == 1:
        chunk_config.no_sync_func = model[0].no_sync
    return optimizer


def finalize_gradients(
    model: list[DistributedDataParallel], num_tokens: torch.Tensor | None = None, **named: Any
) -> None:
    """Megatron-Core's reductions at the end of a step, and those of a tower divided by tiles.

    Megatron-Core sums over tensor parallel ranks what sequence parallelism divides, and only with
    it: not what these ranks have computed of different tiles.

    Args:
        model: chunks of this stage.
        num_tokens: supervised tokens of this replica; gradients are divided by those of all.
        named: what else Megatron-Core's schedule gives to its function.
    """
    finalize_model_grads(model, num_tokens, **named)
    sum_gradients(chunk.module for chunk in model)


def _own_settings(config: Config, model: list[DistributedDataParallel]) -> dict[Any, Any]:
    """Overrides for parameters with other settings than `optim` has; each has one at most.

    Groups are numbered over the whole model, so that they are the same on every rank.
    """
    optim = config.optim
    kinds = dict.fromkeys(it.adam for it in resolved(config).values())
    kinds.pop((optim.lr, optim.weight_decay, optim.beta1, optim.beta2), None)
    numbers = {kind: number for number, kind in enumerate(kinds)}
    members: dict[int, set[int]] = {number: set() for number in numbers.values()}
    for chunk in model:
        for name, parameter in chunk.module.named_parameters():
            settings = settings_of(config, *key_and_layer(name, first_layer(chunk.module)))
            if settings.adam in numbers:
                members[numbers[settings.adam]].add(id(parameter))
    overrides: dict[Any, Any] = {}
    for (lr, weight_decay, *betas), number in numbers.items():
        # Not used as a factor; Megatron-Core tells groups apart by it on a resume, and by neither
        # rates nor betas.
        override: dict[str, Any] = {"lr_mult": number + 2.0}
        if lr != optim.lr:
            override |= {"max_lr": lr, "min_lr": lr * peak_ratio(optim)}
        if weight_decay != optim.weight_decay:
            override |= {"start_wd": weight_decay, "end_wd": weight_decay}
        if betas != [optim.beta1, optim.beta2]:
            override["betas"] = tuple(betas)
        belongs = partial(_is_among, members[number])
        overrides[ParamKey(predicate=ParamPredicate(f"settings {number}", belongs))] = override
    return overrides


def _is_among(identities: set[int], parameter: torch.nn.Parameter) -> bool:
    return id(parameter) in identities


def _refuse_gradients_that_are_not_finite(optimizer: MegatronOptimizer) -> None:
    """Makes `step` raise before it updates, on every rank: the norm is one over all ranks."""
    get_grad_norm = optimizer.get_grad_norm

    def finite_grad_norm() -> float:
        norm = float(get_grad_norm())
        if not math.isfinite(norm):
            raise NotFiniteError("gradient norm", norm)
        return norm

    optimizer.get_grad_norm = finite_grad_norm
