"""What the pool's workers run for `parallel.fewer_passes`."""

from __future__ import annotations

from typing import Any

import torch

from dattn_mcore.training.model import build_from_config
from dattn_mcore.training.optimizer import build_optimizer, wrap_ddp
from dattn_mcore.training.runtime import decide_runtime
from dattn_mcore.training.schedule import build_scheduler
from dattn_mcore.training.step import run_schedule, train_step
from tests.distributed.jobs import start
from tests.distributed.visual_jobs import random_inputs


def gradients(tree: dict[str, Any], layouts: Any, in_products: bool) -> dict[str, torch.Tensor]:
    """Gradients of two different micro-batches, by products that add them or by Megatron-Core's DDP.

    Every tensor of a linear that is added in its product also says so.
    """
    config, groups = start(tree)
    runtime = decide_runtime(config) if in_products else None
    (model,) = build_from_config(config, groups, torch.device("cpu"), runtime=runtime)
    wrapped = wrap_ddp([model], config, groups)
    build_optimizer(config, wrapped)
    model.config.finalize_model_grads_func = None
    packs = [random_inputs(config, one) for one in layouts]
    run_schedule(wrapped, packs, groups, forward_only=False)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    added = {name for name, p in named.items() if p.grad_added_to_main_grad}
    assert any("linear_fc1" in name for name in added) is in_products
    return {name: p.main_grad.clone() for name, p in named.items()}


def shards_after_a_step(tree: dict[str, Any], layouts: Any) -> list[tuple[bool, torch.Tensor, Any]]:
    """Of each weight after a step: whether it is one with the optimizer's shard, this, and the weight."""
    config, groups = start(tree)
    (model,) = build_from_config(config, groups, torch.device("cpu"))
    wrapped = wrap_ddp([model], config, groups)
    optimizer = build_optimizer(config, wrapped)
    scheduler = build_scheduler(config, optimizer, 10)
    before = [p.detach().clone() for p in model.parameters()]
    train_step(wrapped, optimizer, scheduler, [random_inputs(config, layouts)], groups)
    assert any(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    found = []
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for shards, weights in (
            (part.shard_fp32_groups, part.model_fp32_groups),
            (part.shard_fp32_from_float16_groups, part.model_float16_groups),
        ):
            pairs = [
                p for group in zip(shards, weights, strict=True) for p in zip(*group, strict=True)
            ]
            found += [
                (shard.data_ptr() == weight.data_ptr(), shard.detach().clone(), weight.detach())
                for shard, weight in pairs
            ]
    return found
