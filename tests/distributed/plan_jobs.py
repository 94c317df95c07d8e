"""What Megatron-Core really builds, to hold the planner against."""

from __future__ import annotations

from typing import Any

import torch

from tests.distributed.jobs import start


def built_state(tree: dict[str, Any]) -> dict[str, Any]:
    """Parameters, buffers and optimizer states of this rank, as built."""
    from dattn_mcore.training.model import build_from_config
    from dattn_mcore.training.optimizer import build_optimizer, wrap_ddp

    config, groups = start(tree)
    chunks = build_from_config(config, groups, torch.device("cpu"), initialize=False)
    parameters = [
        [
            (n, tuple(p.shape), str(p.dtype).removeprefix("torch."), p.requires_grad)
            for n, p in chunk.named_parameters()
        ]
        for chunk in chunks
    ]
    frozen = sum(p.nbytes for chunk in chunks for p in chunk.parameters() if not p.requires_grad)
    model = wrap_ddp(chunks, config, groups)
    optimizer = build_optimizer(config, model)
    buffers = [buffer for chunk in model for buffer in chunk.buffers]
    states = 0
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.is_stub_optimizer:
            continue
        part._init_optimizer_states_with_dummy_values()
        for group in part.optimizer.param_groups:
            for master in group["params"]:
                state = part.optimizer.state[master]
                states += state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes
        for shard in part.shard_fp32_from_float16_groups:
            states += sum(master.nbytes for master in shard if master is not None)
    return {
        "stage": groups.pp.rank(),
        "copy": groups.dp_cp.rank(),
        "copies": groups.dp_cp.size(),
        "parameters": parameters,
        "weights": frozen + sum(buffer.param_data.nbytes for buffer in buffers),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer": states,
    }
