"""Decomposed attention from two calls of a kernel that knows one set of keys.

The parts over visual and over text keys are computed apart and merged by their log-sum-exps into
one exact softmax. The backward pass hands each part's backward the *merged* output and the
*merged* log-sum-exp, as ring attention does; the kernels then produce the exact joint gradients,
and no gradient through a log-sum-exp is ever needed (flash kernels drop it silently).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from dattn_mcore.layers.attention.options import AttentionOptions
from dattn_mcore.layers.attention.rotary import Rotary, rotate
from dattn_mcore.layers.layout import DecomposedSeqParams


class Part(Protocol):
    """Attention of packed rows over one set of keys."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Output [rows, heads, d], lse [rows, heads], and what the backward pass needs besides.

        Rows that see nothing have output zero and lse minus infinity.
        """

    def backward(
        self,
        grad: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        state: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Gradients of q, k, v for a given (merged) output and log-sum-exp."""


class Parts(Protocol):
    """Makes the parts of a pack; index tensors are kept in `params.cache`."""

    def causal(
        self,
        params: DecomposedSeqParams,
        name: str,
        lengths: tuple[int, ...],
        options: AttentionOptions,
        device: torch.device,
    ) -> Part:
        """Each sample's rows over its rows so far, within the window; `name` keys the cache."""

    def blocks(
        self, params: DecomposedSeqParams, options: AttentionOptions, device: torch.device
    ) -> Part:
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
            part = parts.causal(params, "visual", params.visual_lengths, options, q.device)
            visual = _OnePart.apply(q_visual_rotated, k_visual_rotated, v_visual, part)
    if options.debiased:
        q_to_visual, k_for_text = q, k_visual
    else:
        q_to_visual, k_for_text = q_rotated, rotate(k_visual, rotary.visual)
    text = _TwoParts.apply(
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
    part = parts.causal(params, "reading", lengths, options, q.device)
    out = _OnePart.apply(q[order], k[order], v[order], part)
    return torch.zeros_like(q).index_copy(0, order, out)


class _OnePart(torch.autograd.Function):
    """A single part as a differentiable function."""

    @staticmethod
    def forward(ctx, q, k, v, part):
        out, lse, ctx.state = part.forward(q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.part = part
        return out

    @staticmethod
    def backward(ctx, grad):
        return *ctx.part.backward(grad, *ctx.saved_tensors, ctx.state), None


class _TwoParts(torch.autograd.Function):
    """Text rows over visual and over text keys, merged."""

    @staticmethod
    def forward(ctx, q_v, q_t, k_v, v_v, k_t, v_t, over_visual, over_text, merge):
        out_v, lse_v, state_v = over_visual.forward(q_v, k_v, v_v)
        out_t, lse_t, state_t = over_text.forward(q_t, k_t, v_t)
        ctx.parts, ctx.states = (over_visual, over_text), (state_v, state_t)
        if merge == "sum":
            ctx.save_for_backward(q_v, q_t, k_v, v_v, k_t, v_t, out_v, lse_v, out_t, lse_t)
            return out_v + out_t
        lse = torch.logaddexp(lse_v, lse_t)
        # Padding rows see nothing on either side: keep their weights finite, their output is zero.
        lse = lse.masked_fill(lse.isinf(), 0.0)
        out = (lse_v - lse).exp()[..., None] * out_v + (lse_t - lse).exp()[..., None] * out_t
        out = out.to(q_v.dtype)
        ctx.save_for_backward(q_v, q_t, k_v, v_v, k_t, v_t, out, lse, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad):
        q_v, q_t, k_v, v_v, k_t, v_t, out_v, lse_v, out_t, lse_t = ctx.saved_tensors
        over_visual, over_text = ctx.parts
        state_v, state_t = ctx.states
        dq_v, dk_v, dv_v = over_visual.backward(grad, q_v, k_v, v_v, out_v, lse_v, state_v)
        dq_t, dk_t, dv_t = over_text.backward(grad, q_t, k_t, v_t, out_t, lse_t, state_t)
        return dq_v, dq_t, dk_v, dv_v, dk_t, dv_t, None, None, None
