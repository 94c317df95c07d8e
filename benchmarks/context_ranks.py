"""What one context parallel rank sends: counted in a layer's attention, a ring, a training step.

Counted are the calls of `torch.distributed` (`parallel.collectives.Tracer` has each one's formula).
Beside it stands what the process wrote to its sockets by the operating system's own count, with the
messages' headers. A CPU's backend writes what it sends, so both must agree but for these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.context_formulas import Shape
from benchmarks.context_memory import pack
from benchmarks.ring_attention import ring_attention
from benchmarks.steps import sized_config, trained_by
from dattn_mcore.config.schema import Config
from dattn_mcore.layers.attention import BACKENDS, AttentionInputs, AttentionOptions, Rotary
from dattn_mcore.layers.attention.context import attend_in_context
from dattn_mcore.layers.attention.rotary import rotary_angles
from dattn_mcore.layers.context import share_of
from dattn_mcore.layers.layout import build_seq_params
from dattn_mcore.parallel.collectives import Collective, Tracer, group_names
from dattn_mcore.parallel.groups import destroy_model_parallel, initialize_model_parallel
from dattn_mcore.training.inputs import to_model_inputs, with_own_tiles

SIDE = 10  # patches of a tile: V is a multiple of their square
_WRITTEN = Path("/proc/self/io")


@dataclass(frozen=True)
class Sent:
    """Bytes of one rank and one layer.

    Attributes:
        forward, backward: counted.
        written: to sockets, of both, headers included; None where the system does not say.
        calls: that were counted.
    """

    forward: int
    backward: int
    written: int | None
    calls: int


@dataclass(frozen=True)
class SentInStep:
    """Bytes that one rank sends in a training step.

    Attributes:
        attention: of all layers.
        exchange: of visual rows before the first layer, and of their gradients.
        gradients: of all weights, and the updated weights.
        other: sums of losses, norms and the like.
    """

    attention: int
    exchange: int
    gradients: int
    other: int


def layer_attention(shape: Shape) -> Sent:
    """D-Attn's attention of one layer: one sample, its visual rows before its text rows."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    whole = build_seq_params(
        (((True, shape.visual), (False, shape.text)),),
        t2v_position="none",
        multiple=ranks,
    )
    params = share_of(whole, rank, ranks)
    text, visual = params.num_text, params.num_visual
    d = shape.head_dim
    frequencies = 10_000.0 ** -(torch.arange(0, d, 2) / d)
    q, k_text, v_text, k_visual, v_visual = (
        _random(rows, heads, d)
        for rows, heads in (
            (text, shape.heads),
            (text, shape.groups),
            (text, shape.groups),
            (visual, shape.groups),
            (visual, shape.groups),
        )
    )
    inputs = AttentionInputs(
        q=q,
        k_text=k_text,
        v_text=v_text,
        k_visual=k_visual,
        v_visual=v_visual,
        q_visual=None,
        rotary=Rotary(
            text=rotary_angles(params.text_positions, frequencies),
            visual=rotary_angles(params.visual_positions, frequencies),
        ),
        params=params,
    )
    options = AttentionOptions(scale=d**-0.5)
    backend, world = BACKENDS["sdpa"], dist.group.WORLD
    assert world is not None
    return _count(lambda: attend_in_context(inputs, options, backend, world))


def layer_ring(shape: Shape) -> Sent:
    """Ring attention over the same rows."""
    rows, d, world = shape.rows // dist.get_world_size(), shape.head_dim, dist.group.WORLD
    assert world is not None
    q, k, v = (_random(rows, heads, d) for heads in (shape.heads, shape.groups, shape.groups))
    return _count(lambda: ring_attention(q, k, v, d**-0.5, world))


def step_config(shape: Shape, ranks: int, layers: int, recompute: str = "none") -> Config:
    """A small model whose attention has this shape; its tower is frozen, its projector learns."""
    llm = {
        "num_attention_heads": shape.heads,
        "num_query_groups": shape.groups,
        "head_dim": shape.head_dim,
    }
    vision = {"image_size": SIDE * 14, "patch_size": 14}
    return sized_config(
        "tiny",
        "cpu",
        layers,
        parallel={"cp": ranks},
        model={"llm": llm, "vision": vision},
        train={"recompute": recompute},
    )


def training_step(shape: Shape, layers: int, recompute: str = "none") -> SentInStep:
    """A step of a model, the second: whatever happens once has happened.

    Args:
        shape: of a layer's attention.
        layers: of the model.
        recompute: `train.recompute`.
    """
    ranks = dist.get_world_size()
    config, device = step_config(shape, ranks, layers, recompute), torch.device("cpu")
    groups = initialize_model_parallel(seed=1, cp=ranks)
    whole = pack(config, shape.visual, shape.text)
    inputs = to_model_inputs(with_own_tiles(whole, groups), config, groups, device)
    step = trained_by(config, groups, device)(inputs)
    step()
    with Tracer(group_names(groups)) as tracer:
        step()
    sums = {"attention": 0, "exchange": 0, "gradients": 0, "other": 0}
    for one in tracer.collectives:
        sums[_purpose(one)] += round(one.sent)
    destroy_model_parallel()
    return SentInStep(**sums)


def all_of(shapes: Sequence[Shape], layers: int) -> list[tuple[Sent, Sent, SentInStep]]:
    """A layer's attention, the ring and a training step, for each shape in turn."""
    return [
        (layer_attention(shape), layer_ring(shape), training_step(shape, layers))
        for shape in shapes
    ]


def _purpose(one: Collective) -> str:
    """What a call of a step is for; uneven shares have the visual rows of whole tiles alone."""
    if one.operation == "all_to_all":
        return "attention" if one.kept is None else "exchange"
    if one.group == "cp" and one.operation == "all_gather":
        return "attention"
    large = one.operation in ("reduce_scatter", "all_gather") or one.nbytes > 1024
    return "gradients" if one.group in ("dp_cp", "dp") and large else "other"


def _random(rows: int, heads: int, d: int) -> torch.Tensor:
    return torch.randn(rows, heads, d).requires_grad_()


def _count(attend: Callable[[], torch.Tensor]) -> Sent:
    dist.barrier()
    before = _written()
    with Tracer({}) as tracer:
        out = attend()
        forward = round(sum(one.sent for one in tracer.collectives))
        out.backward(torch.ones_like(out))
    after = _written()
    backward = round(sum(one.sent for one in tracer.collectives)) - forward
    written = None if before is None or after is None else after - before
    return Sent(forward, backward, written, len(tracer.collectives))


def _written() -> int | None:
    """Bytes that this process has written so far, by the operating system."""
    if not _WRITTEN.exists():
        return None
    lines = dict(line.split(": ") for line in _WRITTEN.read_text().splitlines())
    return int(lines["wchar"])
