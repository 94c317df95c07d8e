"""Decomposed attention from calls of a kernel that knows one set of keys.

Text rows attend to their text keys and to visual keys in calls of their own, merged into one exact
softmax (`merge`). Visual keys are read in passes that copy no row twice (`rows`), so that memory is
linear in the rows of a pack, however its images and text are interleaved.
"""

from __future__ import annotations

from typing import Protocol

import torch

from dattn_mcore.layers.attention.merge import Merged, Passes, gradients
from dattn_mcore.layers.attention.options import AttentionOptions
from dattn_mcore.layers.attention.rotary import Rotary, rotate
from dattn_mcore.layers.layout import DecomposedSeqParams


class Parts(Protocol):
    """Makes the parts of a pack; index tensors are kept in `params.cache`."""

    def causal(
        self,
        params: DecomposedSeqParams,
        name: str,
        lengths: tuple[int, ...],
        options: AttentionOptions,
        device: torch.device,
    ) -> Passes:
        """Each sample's rows over its rows so far, within the window; `name` keys the cache."""

    def blocks(
        self, params: DecomposedSeqParams, options: AttentionOptions, device: torch.device
    ) -> Passes:
        """Text rows over all visual rows of their block (`DecomposedSeqParams.blocks`)."""


def attend_in_parts(
    q: torch.Tensor,
    k_text: torch.Tensor,
    v_text: torch.Tensor,
    k_visual: torch.Tensor,
    v_visual: torch.Tensor,
    q_visual: torch.Tensor | None,
    rotary: Rotary,
    params: DecomposedSeqParams,
    options: AttentionOptions,
    parts: Parts,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A whole backend; see `layers.attention` for shapes."""
    q_rotated, k_text_rotated = rotate(q, rotary.text), rotate(k_text, rotary.text)
    visual = None
    if q_visual is not None:
        q_visual_rotated = rotate(q_visual, rotary.visual)
        k_visual_rotated = rotate(k_visual, rotary.visual)
        if not options.debiased:
            rows = _in_reading_order(
                torch.cat([q_visual_rotated, q_rotated]),
                torch.cat([k_visual_rotated, k_text_rotated]),
                torch.cat([v_visual, v_text]),
                params,
                options,
                parts,
            )
            visual = rows[: params.num_visual]
            if options.is_baseline:
                return rows[params.num_visual :], visual
        else:
            passes = parts.causal(params, "visual", params.visual_lengths, options, q.device)
            visual = _OneSet.apply(q_visual_rotated, k_visual_rotated, v_visual, passes)
    if options.debiased:
        q_to_visual, k_for_text = q, k_visual
    else:
        q_to_visual, k_for_text = q_rotated, rotate(k_visual, rotary.visual)
    text = _TwoSets.apply(
        *(q_to_visual, q_rotated, k_for_text, v_visual, k_text_rotated, v_text),
        parts.blocks(params, options, q.device),
        parts.causal(params, "text", params.text_lengths, options, q.device),
        options.merge,
    )
    return text, visual


def _in_reading_order(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    params: DecomposedSeqParams,
    options: AttentionOptions,
    parts: Parts,
) -> torch.Tensor:
    """Stock causal attention over `[visual; text]` rows, put in reading order and back."""
    order = params.reading_order
    lengths = tuple(a + b for a, b in zip(params.visual_lengths, params.text_lengths, strict=True))
    passes = parts.causal(params, "reading", lengths, options, q.device)
    out = _OneSet.apply(q[order], k[order], v[order], passes)
    return torch.zeros_like(q).index_copy(0, order, out)


class _OneSet(torch.autograd.Function):
    """Rows over one set of keys."""

    @staticmethod
    def forward(ctx, q, k, v, passes):
        merged = Merged(q, len(passes))
        ctx.passes, ctx.states = passes, merged.add(passes, q, k, v)
        out, lse = merged.result()
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad):
        return *gradients(ctx.passes, ctx.states, grad, *ctx.saved_tensors), None


class _TwoSets(torch.autograd.Function):
    """Text rows over visual and over text keys, merged."""

    @staticmethod
    def forward(ctx, q_v, q_t, k_v, v_v, k_t, v_t, over_visual, over_text, merge):
        ctx.passes = over_visual, over_text
        if merge == "sum":
            visual, text = Merged(q_v, len(over_visual)), Merged(q_t, len(over_text))
        else:
            visual = text = Merged(q_t, len(over_visual) + len(over_text))
        states_t = text.add(over_text, q_t, k_t, v_t)
        ctx.states = visual.add(over_visual, q_v, k_v, v_v), states_t
        out, lse = text.result()
        out_v, lse_v = (out, lse) if visual is text else visual.result()
        ctx.save_for_backward(q_v, q_t, k_v, v_v, k_t, v_t, out_v, lse_v, out, lse)
        return out if visual is text else out_v + out

    @staticmethod
    def backward(ctx, grad):
        q_v, q_t, k_v, v_v, k_t, v_t, out_v, lse_v, out_t, lse_t = ctx.saved_tensors
        over_visual, over_text = ctx.passes
        states_v, states_t = ctx.states
        dq_v, dk_v, dv_v = gradients(over_visual, states_v, grad, q_v, k_v, v_v, out_v, lse_v)
        dq_t, dk_t, dv_t = gradients(over_text, states_t, grad, q_t, k_t, v_t, out_t, lse_t)
        return dq_v, dq_t, dk_v, dv_v, dk_t, dv_t, None, None, None
