"""What the pool's workers run: attention of text rows over rows that are divided over ranks."""

from __future__ import annotations

import contextlib
import sys
from unittest import mock

import torch
import torch.distributed as dist

from dattn_mcore.layers.attention import BACKENDS, AttentionInputs, Rotary, flash
from dattn_mcore.layers.attention.context import attend_in_context
from dattn_mcore.layers.attention.rotary import rotary_angles
from dattn_mcore.layers.attention.triton_backend import TritonBackend
from dattn_mcore.layers.attention.triton_tuning import Blocks, Tuning
from dattn_mcore.layers.context import own_text_rows, share_of
from dattn_mcore.layers.layout import build_seq_params
from dattn_mcore.parallel.collectives import Tracer

# Tiles of few rows, so that a chunk of queries and the keys it sees lie in several.
SMALL = Blocks(16, 8)
SMALL_TILES = TritonBackend(Tuning(SMALL, SMALL, SMALL, visual_splits=2, key_splits=2))
NAMES = ("q", "k_text", "v_text", "k_visual", "v_visual")


@contextlib.contextmanager
def installed(backend):
    """flash-attn's stand-in, where it is asked for."""
    if backend != "flash":
        yield
        return
    from tests.unit.layers.flash_stand_in import flash_attn_2

    module = flash_attn_2()
    modules = {module.__name__: module, "flash_attn": module}
    with (
        mock.patch.dict(sys.modules, modules),
        mock.patch.object(flash, "flash_version", lambda head_dim: 2),
    ):
        yield


def divided_attention(*, backend, layouts, images_of, options, stretched, tensors, grad, multiple):
    """Output of this rank's text rows, its five gradients, their rows, and what was sent.

    Args:
        backend: its name.
        layouts: runs of each sample.
        images_of: see `build_seq_params`.
        options: of the layer.
        stretched: how positions are.
        tensors: of the whole pack, by `NAMES`; the same on all ranks.
        grad: of the whole output.
        multiple: rows of the pack are padded up to it.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    whole = build_seq_params(
        layouts,
        t2v_position=options.t2v_position,
        multiple=multiple,
        images_of=images_of,
    )
    params = share_of(whole, rank, ranks)
    text = own_text_rows(params.context, rank)
    visual = torch.arange(rank * params.num_visual, (rank + 1) * params.num_visual)
    places = [text, text, text, visual, visual]
    own = [
        tensor[rows].clone().requires_grad_() for tensor, rows in zip(tensors, places, strict=True)
    ]
    inv_freq = 100.0 ** -(torch.arange(0, own[0].shape[2], 2).double() / own[0].shape[2])
    inputs = AttentionInputs(
        **dict(zip(NAMES, own, strict=True)),
        q_visual=None,
        rotary=Rotary(
            text=rotary_angles(params.text_positions, inv_freq),
            visual=rotary_angles(params.visual_positions, inv_freq),
            rope=stretched,
        ),
        params=params,
    )
    computes = SMALL_TILES if backend == "triton" else BACKENDS[backend]
    with installed(backend), Tracer({dist.group.WORLD.group_name: "cp"}) as tracer:
        out = attend_in_context(inputs, options, computes, dist.group.WORLD)
        out.backward(grad[text].to(out.dtype))
    sent = [(one.operation, one.sent) for one in tracer.collectives]
    return out.detach(), [tensor.grad for tensor in own], places, sent
