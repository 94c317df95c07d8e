"""Gradient norm and size of the update, each part of the model apart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from dattn_mcore.architectures.parameters import part_of
from dattn_mcore.training.hooks import Hook, StepDone
from dattn_mcore.training.sinks.sink import Value
from dattn_mcore.types import Part

PARTS: tuple[Part, ...] = get_args(Part)


class PartNorms(Hook):
    """Measures the last step of each interval, on all ranks.

    Both norms are over the elements that Megatron-Core's own gradient norm counts: each weight
    once, however many ranks hold it. Gradients are those before clipping.

    Args:
        optimizer: Megatron-Core's distributed optimizer.
        model: this stage's chunks.
        pg_collection: process groups.
        device: of this process.
        interval: steps between two measurements.
        last_step: of the run, which is measured too.
        updates: also the ratio of the update to the weights, for which this rank's shard of the
            weights is copied during such a step.
    """

    everywhere = True

    def __init__(
        self,
        optimizer: MegatronOptimizer,
        model: list[DistributedDataParallel],
        pg_collection: ProcessGroupCollection,
        *,
        device: torch.device,
        interval: int,
        last_step: int,
        updates: bool,
    ) -> None:
        self._device, self._last_step = device, last_step
        self._interval, self._updates = interval, updates
        self._shards = list(_shards(optimizer, model, pg_collection.tp))
        self._due = False
        self._before: list[Tensor] | None = None
        self._gradients: Tensor | None = None
        self._newest: dict[str, Value] = {}
        get_grad_norm = optimizer.get_grad_norm

        def measured() -> Any:
            if self._due:
                pairs = [(part, main.grad) for part, main in self._shards]
                self._gradients = _squares(pairs)
            return get_grad_norm()

        optimizer.get_grad_norm = measured

    def before_step(self, step: int) -> None:
        """Keeps the weights of before, where they are needed."""
        self._due = step % self._interval == 0 or step == self._last_step
        self._gradients = self._before = None
        if self._due and self._updates:
            self._before = [main.detach().clone() for _, main in self._shards]

    def after_step(self, done: StepDone) -> None:
        """Adds up over all ranks."""
        self._newest = {}
        if not self._due or done.result.loss is None:
            return
        none = torch.zeros(len(PARTS), dtype=torch.float64)
        sums = [none if self._gradients is None else self._gradients.cpu()]
        if self._updates:
            before = self._before or []
            weights = [(part, main.detach()) for part, main in self._shards]
            changes = [
                (part, main - old) for (part, main), old in zip(weights, before, strict=True)
            ]
            sums += [_squares(weights).cpu(), _squares(changes).cpu()]
            self._before = None
        total = torch.stack(sums).to(self._device)
        dist.all_reduce(total)
        self._newest = _values(total.cpu())

    def values(self) -> dict[str, Value]:
        """`grad_norm/PART` and `update_ratio/PART` of the step just done; empty between."""
        return self._newest


def _values(sums: Tensor) -> dict[str, Value]:
    """From sums of squares [1 or 3, parts]; parts without a gradient are left out."""
    found: dict[str, Value] = {}
    for number, part in enumerate(PARTS):
        if not sums[0, number]:
            continue
        found[f"grad_norm/{part}"] = math.sqrt(float(sums[0, number]))
        if len(sums) > 1:
            found[f"update_ratio/{part}"] = math.sqrt(float(sums[2, number] / sums[1, number]))
    return found


def _squares(pairs: Sequence[tuple[Part, Tensor | None]]) -> Tensor:
    """Sum of squares of each part, float64 [parts], on the tensors' device."""
    device = next((tensor.device for _, tensor in pairs if tensor is not None), None)
    sums = torch.zeros(len(PARTS), dtype=torch.float64, device=device)
    for part, tensor in pairs:
        if tensor is not None:
            sums[PARTS.index(part)] += tensor.float().square().sum(dtype=torch.float64)
    return sums


def _shards(
    optimizer: MegatronOptimizer,
    model: list[DistributedDataParallel],
    tp_group: dist.ProcessGroup,
) -> Iterator[tuple[Part, Tensor]]:
    """(part, this rank's shard of the main weight) of every parameter that counts here."""
    names = {
        id(parameter): name
        for chunk in model
        for name, parameter in chunk.module.named_parameters()
    }
    for one in getattr(optimizer, "chained_optimizers", [optimizer]):
        if one.is_stub_optimizer:
            continue
        for of_model, of_main in (
            (one.model_float16_groups, one.shard_fp32_from_float16_groups),
            (one.model_fp32_groups, one.shard_fp32_groups),
        ):
            for parameters, mains in zip(of_model, of_main, strict=True):
                for parameter, main in zip(parameters, mains, strict=True):
                    counts = param_is_not_shared(parameter)
                    if counts and param_is_not_tensor_parallel_duplicate(parameter, tp_group):
                        yield part_of(names[id(parameter)]), main
