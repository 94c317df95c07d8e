"""What the pool's workers run: every gradient before and after the reductions of a step."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from dattn_mcore.layers.lora import Adapter
from dattn_mcore.training.model import build_from_config
from dattn_mcore.training.optimizer import build_optimizer, wrap_ddp
from dattn_mcore.training.step import run_schedule
from tests.distributed.jobs import start
from tests.distributed.model_jobs import randomize_norms
from tests.distributed.visual_jobs import random_inputs


@dataclass
class Gradient:
    """One rank's piece of one gradient.

    Attributes:
        name: of the parameter on its rank.
        key, offset, shape: of the piece in the whole model, and the whole's shape.
        place: index of the rank in data, pipeline and tensor parallel groups.
        declared: what Megatron-Core's reductions take it for, see `declared`.
        before: sum over this rank's micro-batches; None where it was reduced during backward.
        after: what the optimizer gets.
    """

    name: str
    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    place: tuple[int, int, int]
    declared: str
    before: torch.Tensor | None
    after: torch.Tensor


def declared(name: str, parameter: Any, config: Any) -> str:
    """What a gradient is over the tensor parallel group, by the attributes that decide it.

    Source: `_allreduce_non_tensor_model_parallel_grads` of Megatron-Core 0.16.1.
    """
    if getattr(parameter, "average_gradients_across_tp_domain", False):
        return "mean"
    of_heads = config.qk_layernorm and ("q_layernorm" in name or "k_layernorm" in name)
    if of_heads or (config.sequence_parallel and getattr(parameter, "sequence_parallel", False)):
        return "partial"
    return "sharded" if getattr(parameter, "tensor_model_parallel", False) else "replicated"


def pieces(chunk: Any) -> list[tuple[str, ShardedTensor]]:
    """Copies of a chunk's gradients, each a piece of the whole model's."""
    entries, found = chunk.sharded_state_dict(), []
    for name, parameter in chunk.named_parameters():
        if parameter.requires_grad:
            entry = entries[name]
            entry.data = parameter.main_grad.detach().clone()
            made: Any = {"": entry}
            apply_factories(made)
            found += [(name, piece) for piece in leaves(made)]
    return found


def leaves(tree: Any) -> list[ShardedTensor]:
    """The tensors of nested dictionaries and lists."""
    if isinstance(tree, dict | list):
        values = tree.values() if isinstance(tree, dict) else tree
        return [leaf for value in values for leaf in leaves(value)]
    return [tree] if isinstance(tree, ShardedTensor) else []


def gradients(
    tree: dict[str, Any], layouts: Any, forget: str | None = None
) -> tuple[list[Gradient], float]:
    """This rank's gradients of two equal micro-batches, the same on all replicas; and their norm.

    Args:
        tree: the configuration.
        layouts: of the packs.
        forget: end of a parameter's name whose mark of sequence parallelism is taken away.
    """
    config, groups = start(tree)
    chunks = build_from_config(config, groups, torch.device("cpu"))
    for chunk in chunks:
        randomize_norms(chunk)
        randomize_adapters(chunk)
        for name, parameter in chunk.named_parameters():
            if forget is not None and name.endswith(forget):
                parameter.sequence_parallel = False  # type: ignore[attr-defined]
    inputs = random_inputs(config, layouts)
    wrapped = wrap_ddp(chunks, config, groups)
    optimizer = build_optimizer(config, wrapped)
    reduced_early = config.parallel.overlap_grad_reduce and groups.dp.size() > 1
    for chunk in wrapped:
        chunk.force_all_reduce = True  # every rank gets all of a gradient, not its part
    before: list[tuple[str, ShardedTensor]] = []

    reduce: Any = chunks[0].config.finalize_model_grads_func

    def finalize(model: Any, num_tokens: Any = None, **named: Any) -> None:
        before.extend(piece for chunk in chunks for piece in pieces(chunk))
        reduce(model, num_tokens, **{**named, "force_all_reduce": True})

    chunks[0].config.finalize_model_grads_func = finalize
    run_schedule(wrapped, [inputs, inputs], groups, forward_only=False)
    after = [piece for chunk in chunks for piece in pieces(chunk)]
    parameters = {name: (p, c.config) for c in chunks for name, p in c.named_parameters()}
    place = (groups.dp.rank(), groups.pp.rank(), groups.tp.rank())
    found = [
        Gradient(
            name=name,
            key=one.key,
            offset=tuple(one.global_offset),
            shape=tuple(one.global_shape),
            place=place,
            declared=declared(name, *parameters[name]),
            before=None if reduced_early else one.data,
            after=other.data,
        )
        for (name, one), (_, other) in zip(before, after, strict=True)
    ]
    optimizer.prepare_grads()
    return found, float(optimizer.get_grad_norm())


def randomize_adapters(model: torch.nn.Module) -> None:
    """Adapters that begin at zero have no gradient in one half; the same in every layout."""
    entries = model.sharded_state_dict()
    adapters = [name for name, it in model.named_modules() if isinstance(it, Adapter)]
    for name, _ in model.named_parameters():
        if name.rpartition(".")[0] not in adapters:
            continue
        entry = entries[name]
        made: Any = {"": entry}
        apply_factories(made)
        with torch.no_grad():
            for piece in leaves(made):
                generator = torch.Generator().manual_seed(zlib.crc32(piece.key.encode()))
                whole = 0.1 * torch.randn(piece.global_shape, generator=generator)
                piece.data.copy_(
                    whole[spans(piece.global_offset, piece.data.shape)].view_as(piece.data)
                )


def spans(offset: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Where a piece lies in the whole; leading axes of size one may be missing in its shape."""
    sizes = (1,) * (len(offset) - len(shape)) + tuple(shape)
    return tuple(slice(start, start + size) for start, size in zip(offset, sizes, strict=True))
