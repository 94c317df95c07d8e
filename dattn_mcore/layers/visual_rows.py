"""Visual rows on their own through the layers of a stage, in chunks, recomputed in backward.

With V2V diagonal a visual row's path through the layers depends on that row alone, and text rows
need no more of it than its keys and values in each layer. So the visual rows can go first, a
chunk at a time and without autograd; kept are the rows that entered the stage, and per layer the
keys and values (2 * groups * head_dim numbers a row). Then the text rows go through the layers.
In backward the text rows come first and leave the gradients of all keys and values behind; then
each chunk is computed again, with autograd, and gives its gradients to the weights and to the
rows that entered; with full recomputation it keeps no more than its rows between the layers.
Megatron-Core's `TransformerLayer` does the work of both.

Source: the design follows from arXiv 2502.01906, section 3 (V2V diagonalisation).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import TransformerLayer

from dattn_mcore.layers.layout import DecomposedSeqParams, VisualChunk

Layers = Callable[[torch.Tensor, VisualChunk], "torch.Tensor | None"]


class KeptKeysValues:
    """Keys and values of all visual rows in the layers of a stage, later their gradients.

    A layer's keys and values are let go when their gradient arrives, so both together never take
    more room than one of them.

    Args:
        first_layer: number of the stage's first layer.
    """

    def __init__(self, first_layer: int) -> None:
        self.first_layer = first_layer
        self.values: list[torch.Tensor | None] = []
        self.gradients: list[torch.Tensor | None] = []
        self.hook: torch.Tensor | None = None

    def keys_values(self, layer_number: int) -> torch.Tensor:
        """See `layers.layout.VisualKeysValues`."""
        if self.hook is None:
            self.hook = torch.zeros((), requires_grad=True)
        return _KeysValues.apply(self.hook, self, layer_number - self.first_layer)

    def keep(self, chunk: VisualChunk, rows: slice, rows_here: int, shards: int) -> None:
        """Puts a chunk's keys and values at their place among all rows.

        Args:
            chunk: has been through the layers.
            rows: of a sequence parallel shard, that are in the chunk.
            rows_here: visual rows of a shard.
            shards: number of shards.
        """
        if not self.values:
            sizes = [(rows_here * shards, *kv.shape[1:]) for kv in chunk.keys_values]
            self.values = [
                kv.new_empty(size) for kv, size in zip(chunk.keys_values, sizes, strict=True)
            ]
            self.gradients = [None] * len(sizes)
        for whole, part in zip(self.values, chunk.keys_values, strict=True):
            assert whole is not None
            _of_shards(whole, shards)[:, rows] = _of_shards(part, shards)

    def gradients_of(self, rows: slice, shards: int) -> list[torch.Tensor]:
        """What `keep` put there, as gradients, layer by layer."""
        parts = []
        for layer, gradient in enumerate(self.gradients):
            if gradient is None:  # autograd ran in another order than this module relies on
                raise RuntimeError(
                    f"no gradient of visual keys and values in layer {self.first_layer + layer}"
                )
            parts.append(_of_shards(gradient, shards)[:, rows].flatten(0, 1))
        return parts


def _of_shards(rows: torch.Tensor, shards: int) -> torch.Tensor:
    """View [shards, rows of a shard, ...] of rows in the shards' order."""
    return rows.view(shards, rows.shape[0] // shards, *rows.shape[1:])


class _KeysValues(torch.autograd.Function):
    """Hands out a layer's keys and values, and takes their gradient in.

    The one input that needs a gradient is an empty leaf: what is recomputed (Megatron-Core's
    checkpoint runs autograd inside autograd) must not reach beyond this node.
    """

    @staticmethod
    def forward(ctx, hook, kept, layer):
        ctx.kept, ctx.layer = kept, layer
        return kept.values[layer].detach()

    @staticmethod
    def backward(ctx, gradient):
        ctx.kept.gradients[ctx.layer] = gradient
        ctx.kept.values[ctx.layer] = None
        return None, None, None


class _VisualRows(torch.autograd.Function):
    """Visual rows through all layers; text rows pass, so that they are done first in backward."""

    @staticmethod
    def forward(ctx, visual, text, layers, kept, chunk, shards):
        ctx.layers, ctx.kept, ctx.chunk, ctx.shards = layers, kept, chunk, shards
        ctx.save_for_backward(visual)
        ctx.set_materialize_grads(False)
        output, visual = None, visual.detach()
        for rows in _chunks(visual, chunk):
            part = VisualChunk()
            out = layers(visual[rows], part)
            kept.keep(part, rows, visual.shape[0], shards)
            if out is not None:
                output = torch.empty_like(visual) if output is None else output
                output[rows] = out
        return text.view_as(text), output

    @staticmethod
    def backward(ctx, d_text, d_output):
        (visual,) = ctx.saved_tensors
        d_visual = torch.empty_like(visual) if ctx.needs_input_grad[0] else None
        for rows in _chunks(visual, ctx.chunk):
            part = VisualChunk()
            # Always: Megatron-Core's checkpoint leaves weights out if its input learns nothing.
            entered = visual[rows].detach().requires_grad_()
            with torch.enable_grad():
                out = ctx.layers(entered, part)
            roots, gradients = part.keys_values, ctx.kept.gradients_of(rows, ctx.shards)
            if out is not None and d_output is not None:
                roots, gradients = [*roots, out], [*gradients, d_output[rows]]
            learn = [root.requires_grad for root in roots]  # not those of frozen layers below all
            if any(learn):
                torch.autograd.backward(
                    list(itertools.compress(roots, learn)),
                    list(itertools.compress(gradients, learn)),
                )
            if d_visual is not None:
                d_visual[rows] = entered.grad
        ctx.kept.gradients = []  # the graph may outlive this pass by a forward pass
        return d_visual, d_text, None, None, None, None


def _chunks(rows: torch.Tensor, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, rows.shape[0], size)]


class DecomposedBlock(TransformerBlock):
    """Megatron-Core's stack of layers; with `visual_chunk`, visual rows go through it first.

    Weights get their gradients chunk by chunk, so data parallel reduction must not begin with a
    weight's first gradient (`overlap_grad_reduce`).

    Args:
        visual_chunk: visual rows of the pack (all sequence parallel shards together) that are
            computed at a time; None: visual and text rows go together.
        **kwargs: Megatron-Core's.
    """

    def __init__(self, *, visual_chunk: int | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.visual_chunk = visual_chunk

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        packed_seq_params: DecomposedSeqParams,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Takes `[V; T]` (of this shard) and returns it, or text rows alone on the last stage."""
        params = packed_seq_params
        chunk = self.visual_chunk if params.num_visual and len(self.layers) else None
        if chunk is None or not torch.is_grad_enabled():
            return super().forward(
                hidden_states, attention_mask, packed_seq_params=params, **kwargs
            )
        rows = hidden_states if self.pre_process else self.input_tensor
        shards = self.tp_group.size() if self.config.sequence_parallel else 1
        visual_here = params.num_visual // shards
        kept = KeptKeysValues(self.layers[0].layer_number)
        text, visual = _VisualRows.apply(
            rows[:visual_here],
            rows[visual_here:],
            self._visual_rows,
            kept,
            max(1, chunk // shards),
            shards,
        )
        self.set_input_tensor(text)
        text = super().forward(
            text, attention_mask, packed_seq_params=replace(params, visual=kept), **kwargs
        )
        return text if visual is None else torch.cat([visual, text])

    def _visual_rows(self, rows: torch.Tensor, chunk: VisualChunk) -> torch.Tensor | None:
        """A chunk through the layers; None where nobody reads what comes out."""
        for layer in self.layers:
            if self.post_process and layer is self.layers[-1]:
                normed = layer.input_layernorm(rows)
                chunk.keys_values.append(layer.self_attention.keys_values(normed))
                return None
            through = functools.partial(_through_layer, layer)
            if self.config.recompute_granularity == "full" and torch.is_grad_enabled():
                rows, keys_values = tensor_parallel.checkpoint(through, False, rows)
            else:
                rows, keys_values = through(rows)
            chunk.keys_values.append(keys_values)
        return rows


def _through_layer(layer: TransformerLayer, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Visual rows after a layer, and their keys and values in it."""
    chunk = VisualChunk()
    rows, _ = layer(rows, packed_seq_params=chunk, rotary_pos_emb=None)
    return rows, *chunk.keys_values
