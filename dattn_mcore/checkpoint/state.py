"""What a checkpoint holds: model, optimizer and RNG as Megatron-Core's sharded state."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any, Literal

import torch
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor

from dattn_mcore.checkpoint.content import EMA, RNG
from dattn_mcore.layers.adaptable import adapter_names
from dattn_mcore.models.dattn import DattnModel
from dattn_mcore.parallel import platform

Kind = Literal["all", "base", "run"]
_TRACKER = "tracker."  # in names of RNG states: of Megatron-Core's tracker
_OF_CONTEXT = (platform.CONTEXT_RNG, platform.OWN_CONTEXT_RNG)
# Optimizer state per parameter in its full shape: loads into any tp, pp and dp.
METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def metadata(pg_collection: ProcessGroupCollection) -> dict[str, Any]:
    """Options for Megatron-Core's `sharded_state_dict` calls."""
    return {**METADATA, "dp_cp_group": pg_collection.dp_cp}


def names_of_kind(chunk: DattnModel, kind: Kind) -> Collection[str]:
    """Names of the parameters of a chunk that a checkpoint of a kind holds; see `model_state`."""
    every = {name for name, _ in chunk.named_parameters()}
    if not chunk.has_adapters or kind == "all":
        return every
    if kind == "base":
        return every - adapter_names(chunk)
    return {name for name, parameter in chunk.named_parameters() if parameter.requires_grad}


def model_state(
    chunks: list[DattnModel],
    pg_collection: ProcessGroupCollection,
    kind: Kind = "all",
    *,
    by_layer: bool = False,
) -> dict[str, dict[str, Any]]:
    """Sharded weights of this rank's chunks, under the names `model0`, `model1`, ...

    Args:
        chunks: of this rank.
        pg_collection: process groups.
        kind: of a model with adapters: `all`, `base` (all but the adapters), or `run`: what
            learns, which is what a run with adapters saves. Without adapters all of it, always.
        by_layer: a tensor of its own for each layer; otherwise one for a stack of them.
    """
    state = {}
    options = metadata(pg_collection)
    if by_layer:
        options["non_homogeneous_layers"] = True  # Megatron-Core's name
    for index, chunk in enumerate(chunks):
        left_out = {name for name, _ in chunk.named_parameters()} - set(names_of_kind(chunk, kind))
        entries = chunk.sharded_state_dict(metadata=options)
        # FP8 scales of Transformer Engine aside (`fp8_scales`), `_extra_state` is empty; without it
        # a checkpoint is the same for every layer spec.
        state[f"model{index}"] = {
            name: entry
            for name, entry in entries.items()
            if not name.endswith("_extra_state") and name not in left_out
        }
    return state


def ema_state(
    model: dict[str, dict[str, Any]], means: list[dict[str, Tensor]]
) -> dict[str, dict[str, Any]]:
    """Sharded running mean of the weights, cut over the ranks as they are.

    Args:
        model: from `model_state`.
        means: of this rank's chunks, float32 by the names of parameters; frozen ones are missing.
    """
    return {
        f"ema{index}": {
            name: _with_data(model[f"model{index}"][name], mean) for name, mean in chunk.items()
        }
        for index, chunk in enumerate(means)
    }


def _with_data(entry: Any, mean: Tensor) -> ShardedTensor | ShardedTensorFactory:
    """The sharded entry of a weight with its mean in it, under a key of its own."""
    key = f"{EMA}{entry.key}"
    if isinstance(entry, ShardedTensorFactory):
        return replace(entry, key=key, data=mean)
    return replace(entry, key=key, data=mean, dtype=mean.dtype)


def optimizer_state(
    optimizer: MegatronOptimizer,
    model: dict[str, dict[str, Any]],
    pg_collection: ProcessGroupCollection,
    is_loading: bool,
) -> dict[str, Any]:
    """Sharded optimizer state that matches a `model_state`.

    Where only some layers of a stack learn (`config.optim_groups.layers_differ`), the `model_state`
    must be `by_layer`: Megatron-Core saves no stack that lacks layers.
    """
    if not is_loading:
        for part in getattr(optimizer, "chained_optimizers", [optimizer]):
            if not part.is_stub_optimizer and not part.optimizer.state:
                _begin(part.optimizer)
    return optimizer.sharded_state_dict(
        model, is_loading=is_loading, metadata=metadata(pg_collection)
    )


def _begin(adam: torch.optim.Optimizer) -> None:
    """Gives Adam the state of before its first update: averages of 0, after 0 steps.

    It makes them in its first update, and Megatron-Core saves no optimizer without; a run whose
    first steps have nothing to learn from is saved before.
    """
    rates = [group["lr"] for group in adam.param_groups]
    for group in adam.param_groups:
        group["lr"] = 0.0  # weights stay, and so does their decay, which goes by the rate
        for parameter in group["params"]:
            if parameter.numel():  # fused ones refuse what is empty
                parameter.grad = torch.zeros_like(parameter)
    adam.step()
    adam.zero_grad()
    for group, rate in zip(adam.param_groups, rates, strict=True):
        group["lr"] = rate
        if "step" in group:  # Transformer Engine and Apex count here, PyTorch in each state
            group["step"] = 0
    for state in adam.state.values():
        if "step" in state:
            state["step"].zero_()


def rng_state(
    pg_collection: ProcessGroupCollection, layout: tuple[int, int]
) -> dict[str, ShardedTensor]:
    """RNG of this tensor and pipeline rank; meaningful in the same (pp, tp) layout only.

    The states are tensors of bytes, so that a checkpoint needs no pickled entry. What context
    parallel ranks have of their own is named by how many they are: others do not find it.
    """
    cp = (get_pg_rank(pg_collection.cp), get_pg_size(pg_collection.cp))
    pp, tp = (get_pg_rank(pg_collection.pp), layout[0]), (get_pg_rank(pg_collection.tp), layout[1])
    return {
        name: ShardedTensor.from_rank_offsets(
            f"{RNG}{name}.of_{cp[1]}",
            value.cpu()[None, None, None],
            (0, *pp),
            (1, *tp),
            (2, *cp),
            replica_id=get_pg_rank(pg_collection.dp),
        )
        if name.removeprefix(_TRACKER) in _OF_CONTEXT
        else ShardedTensor.from_rank_offsets(
            f"{RNG}{name}",
            value.cpu()[None, None],
            (0, *pp),
            (1, *tp),
            replica_id=get_pg_rank(pg_collection.dp_cp),
        )
        for name, value in flat_rng(platform.rng_state()).items()
    }


def flat_rng(states: dict[str, Any]) -> dict[str, Tensor]:
    """`platform.rng_state` without its inner level."""
    flat = {f"{_TRACKER}{name}": value for name, value in states["tracker"].items()}
    return {"torch": states["torch"], "device": states["device"], **flat}


def nested_rng(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What `platform.set_rng_state` takes, from what a checkpoint gave for `rng_state`."""
    tracker = {
        name.removeprefix(_TRACKER): value.flatten()
        for name, value in tensors.items()
        if name.startswith(_TRACKER)
    }
    return {
        **{name: tensors[name][0, 0] for name in ("torch", "device")},
        "tracker": tracker,
    }


def old_rng_key(pg_collection: ProcessGroupCollection, layout: tuple[int, int]) -> str:
    """Name of this rank's byte entry in a checkpoint of format 1."""
    rank = get_pg_rank(pg_collection.pp), get_pg_rank(pg_collection.tp)
    return ShardedObject(f"rng_pp{layout[0]}_tp{layout[1]}", None, layout, rank).unique_key


def layout_of(pg_collection: ProcessGroupCollection) -> tuple[int, int]:
    """(pp, tp) sizes."""
    return get_pg_size(pg_collection.pp), get_pg_size(pg_collection.tp)
