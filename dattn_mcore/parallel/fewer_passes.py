"""One pass over all weights where Megatron-Core takes several, without Apex and Transformer Engine.

Each holds for megatron-core 0.16.1 to 0.19.2; tests in tests/distributed/test_fewer_passes.py:

1. clipping writes scaled gradients into new memory and copies them back;
2. after a step, float32 weights are copied from the optimizer's shards, which are views of them.

On a CPU besides:

3. a group of one rank sends to itself, which the backend copies;
4. a weight's gradient is computed, then added into DDP's buffer. On a GPU Apex's extension does
   both in one product; here one of PyTorch's that adds does.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from dattn_mcore.parallel import platform

_installed = False


def adam_in_one_pass(optimizer: torch.optim.Optimizer | None) -> None:
    """Has PyTorch's AdamW update a tensor in one kernel; another optimizer stays as it is.

    Megatron-Core builds it without; a checkpoint's parameter groups say what was when it was saved.
    """
    if type(optimizer) is not torch.optim.AdamW:
        return
    for group in optimizer.param_groups:
        group["fused"] = all(p.device.type != "meta" for p in group["params"])  # of a rehearsal


def install() -> None:
    """Applies all that concerns this process, once."""
    global _installed
    if _installed:
        return
    _installed = True
    from megatron.core.optimizer import distrib_optimizer

    if not distrib_optimizer.HAVE_APEX_OR_TE:
        _scale_in_place()
        _leave_views_alone(distrib_optimizer.DistributedOptimizer)
    if platform.current_device().type == "cpu":
        _send_nothing_alone()
        _add_in_products()


def _scale_in_place() -> None:
    from megatron.core.optimizer import clip_grads

    def scale(chunk: int, flag: Any, tensors: Sequence[list[torch.Tensor]], factor: float) -> None:
        for source, target in zip(*tensors, strict=True):
            if source.data_ptr() == target.data_ptr():
                target.mul_(factor)
            else:
                torch.mul(source, factor, out=target)

    clip_grads.multi_tensor_scale_impl = scale


def _leave_views_alone(optimizer: Any) -> None:
    copy = optimizer._copy_main_params_to_model_params

    def copy_others(self: Any) -> None:
        if self.is_stub_optimizer:
            return
        groups = self.model_fp32_groups, self.shard_fp32_groups
        buffers = {
            bucket.param_data.untyped_storage().data_ptr()
            for buffer in self.buffers
            for bucket in buffer.buckets
            if bucket.param_data is not None
        }
        shards = (shard for group in self.shard_fp32_groups for shard in group)
        if all(shard.untyped_storage().data_ptr() in buffers for shard in shards):
            self.model_fp32_groups, self.shard_fp32_groups = [], []
        try:
            copy(self)
        finally:
            self.model_fp32_groups, self.shard_fp32_groups = groups

    optimizer._copy_main_params_to_model_params = copy_others


def _send_nothing_alone() -> None:
    from megatron.core.distributed import param_and_grad_buffer as buffers

    def unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(output: torch.Tensor, given: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            alone = dist.get_world_size(kwargs.get("group")) == 1
            if alone and output.data_ptr() == given.data_ptr():
                return None
            return collective(output, given, *args, **kwargs)

        return call

    buffers.dist_reduce_scatter_func = unless_alone(buffers.dist_reduce_scatter_func)
    buffers.dist_all_gather_func = unless_alone(buffers.dist_all_gather_func)


def _add_in_products() -> None:
    """Stands in for Apex's extension; `Runtime.gradient_accumulation_fusion` asks for it."""
    from megatron.core.tensor_parallel import layers

    def add(rows: torch.Tensor, gradient: torch.Tensor, buffer: torch.Tensor) -> None:
        if rows.dtype == buffer.dtype:
            buffer.addmm_(gradient.t(), rows)
        else:
            buffer.add_(gradient.t() @ rows)

    extension = types.SimpleNamespace(wgrad_gemm_accum_fp32=add, wgrad_gemm_accum_fp16=add)
    setattr(layers, platform.ADDS_GRADIENTS, extension)
    layers._grad_accum_fusion_available = True
