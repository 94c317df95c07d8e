"""The `triton` backend: every mode on the project's own joint kernel, forward and backward.

The kernel asks with a query row two sets of keys under one softmax: visual keys, a visible range
per row, with the query as it is; text keys, causally, with the query rotated. Text keys are rotated
once per call by a kernel of their own, for all query tiles. Nothing rotated is kept for the
backward pass.

The baseline's modes are the same kernel with other rows in the causal place: visual rows that
attend to visual rows before them, or all rows in reading order.

Triton is imported (with `triton_launch`) at the first call: where it is missing, all else works.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from dattn_mcore.layers.attention.options import AttentionOptions
from dattn_mcore.layers.attention.rotary import Rotary, rotate
from dattn_mcore.layers.attention.triton_plan import Keys, Plan, Setting
from dattn_mcore.layers.attention.triton_tuning import Tuning
from dattn_mcore.layers.attention.visible_ranges import Ranges, block_ranges, causal_ranges
from dattn_mcore.layers.layout import DecomposedSeqParams

HEAD_DIMS = (16, 32, 64, 128, 256)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def triton_refuses(
    options: AttentionOptions, device_type: str, dtype: torch.dtype, head_dim: int
) -> str | None:
    """Why the kernel cannot run here or compute this; None if it can."""
    if not installed():
        return "the package triton is not installed (pip install triton)"
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "it needs a GPU (TRITON_INTERPRET=1 in the environment interprets it, for tests)"
    if head_dim not in HEAD_DIMS:
        return f"head size {head_dim} is none of {', '.join(map(str, HEAD_DIMS))}"
    if dtype not in _DTYPES:
        return f"it computes bf16, fp16 and fp32, not {dtype}"
    if options.window is not None and not options.debiased and not options.is_baseline:
        return "it has no sliding window between text and visual rows in this mixed mode"
    return None


def installed() -> bool:
    """Whether Triton can be imported; without importing it."""
    return importlib.util.find_spec("triton") is not None


def triton_attention(
    q: torch.Tensor,
    k_text: torch.Tensor,
    v_text: torch.Tensor,
    k_visual: torch.Tensor,
    v_visual: torch.Tensor,
    q_visual: torch.Tensor | None,
    rotary: Rotary,
    params: DecomposedSeqParams,
    options: AttentionOptions,
    tuning: Tuning = Tuning(),  # noqa: B008 (frozen)
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See `layers.attention` for shapes."""
    visual = None
    if q_visual is not None:
        if options.debiased:
            # On their own axis, visual rows are a causal sequence of their own.
            visual = _causal(
                q_visual,
                k_visual,
                v_visual,
                rotary.visual,
                params,
                "visual",
                params.visual_lengths,
                options,
                tuning,
            )
        else:
            rows = _in_reading_order(
                *(q, k_text, v_text, k_visual, v_visual, q_visual, rotary),
                *(params, options, tuning),
            )
            visual = rows[: params.num_visual]
            if options.is_baseline:
                return rows[params.num_visual :], visual
    k_for_text = k_visual if options.debiased else rotate(k_visual, rotary.visual)
    plan = text_plan(params, options, q.device)
    inputs = (q, k_text, v_text, k_for_text, v_visual, rotary.text, plan)
    has_visual = bool(params.blocks)
    if options.merge == "sum":
        text = joint(*inputs, _setting(options, tuning, has_visual=False))[0]
        if has_visual:
            text = text + joint(*inputs, _setting(options, tuning, has_text=False))[0]
        return text, visual
    return joint(*inputs, _setting(options, tuning, has_visual=has_visual))[0], visual


def joint(
    q: torch.Tensor,
    k_text: torch.Tensor,
    v_text: torch.Tensor,
    k_visual: torch.Tensor,
    v_visual: torch.Tensor,
    angles: torch.Tensor,
    plan: Plan,
    setting: Setting,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of the rows of a plan; the latter carries no gradient.

    Args:
        q: [rows, heads, head_dim], not rotated.
        k_text, v_text: [rows, groups, head_dim], not rotated.
        k_visual, v_visual: [V, groups, head_dim].
        angles: [rows, 1, 1, head_dim] of q and k_text.
        plan: who sees what.
        setting: what is computed.
    """
    from dattn_mcore.layers.attention.triton_launch import rotation_tables

    tables = rotation_tables(angles)
    return _Joint.apply(q, k_text, v_text, k_visual, v_visual, tables, plan, setting)


def text_plan(params: DecomposedSeqParams, options: AttentionOptions, device: torch.device) -> Plan:
    """Text rows over visual rows and causally over text rows; kept with the pack."""
    # Rotated on one axis with visual rows, positions have gaps, but then there is no window.
    key = ("triton", "text", options.window)
    if key not in params.cache:
        params.cache[key] = Plan(
            lengths=params.text_lengths,
            visual=block_ranges(params.blocks, params.text_lengths, params.visual_lengths),
            text=causal_ranges(params.text_lengths, options.window),
            device=device,
        )
    return params.cache[key]


def _setting(
    options: AttentionOptions, tuning: Tuning, has_visual: bool = True, has_text: bool = True
) -> Setting:
    return Setting(
        *(options.scale, options.softcap, options.debiased, has_visual, has_text, tuning)
    )


def _causal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    angles: torch.Tensor,
    params: DecomposedSeqParams,
    name: str,
    lengths: tuple[int, ...],
    options: AttentionOptions,
    tuning: Tuning,
) -> torch.Tensor:
    """Causal attention among packed rows: the joint kernel without visual keys."""
    key = ("triton", name, options.window)
    if key not in params.cache:
        causal = causal_ranges(lengths, options.window)
        nothing = Ranges(causal.low, causal.low, (0,) * len(lengths))
        params.cache[key] = Plan(lengths, nothing, causal, q.device)
    setting = _setting(options, tuning, has_visual=False)
    return joint(q, k, v, k[:0], v[:0], angles, params.cache[key], setting)[0]


def _in_reading_order(
    q: torch.Tensor,
    k_text: torch.Tensor,
    v_text: torch.Tensor,
    k_visual: torch.Tensor,
    v_visual: torch.Tensor,
    q_visual: torch.Tensor,
    rotary: Rotary,
    params: DecomposedSeqParams,
    options: AttentionOptions,
    tuning: Tuning,
) -> torch.Tensor:
    """Stock causal attention over `[visual; text]` rows, put in reading order and back."""
    order = params.reading_order
    lengths = tuple(a + b for a, b in zip(params.visual_lengths, params.text_lengths, strict=True))
    out = _causal(
        torch.cat([q_visual, q])[order],
        torch.cat([k_visual, k_text])[order],
        torch.cat([v_visual, v_text])[order],
        torch.cat([rotary.visual, rotary.text])[order],
        params,
        "reading",
        lengths,
        options,
        tuning,
    )
    rows = q.shape[0] + q_visual.shape[0]
    return out.new_zeros((rows, *out.shape[1:])).index_copy(0, order, out)


class _Joint(torch.autograd.Function):
    """The kernels as one differentiable function."""

    @staticmethod
    def forward(ctx, q, k_text, v_text, k_visual, v_visual, tables, plan, setting):
        from dattn_mcore.layers.attention.triton_launch import forward, rotated

        q, k_text, v_text, k_visual, v_visual = (
            x if x.stride(-1) == 1 else x.contiguous()
            for x in (q, k_text, v_text, k_visual, v_visual)
        )
        k_rotated = rotated(k_text, tables) if setting.has_text else k_text
        keys = Keys(k_rotated, v_text, k_visual, v_visual)
        out, lse = forward(q, keys, tables, plan, setting)
        ctx.save_for_backward(q, k_text, v_text, k_visual, v_visual, tables, out, lse)
        ctx.plan, ctx.setting = plan, setting
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, d_out, _):
        from dattn_mcore.layers.attention.triton_gradients import backward
        from dattn_mcore.layers.attention.triton_launch import rotated

        q, k_text, v_text, k_visual, v_visual, tables, out, lse = ctx.saved_tensors
        k_rotated = rotated(k_text, tables) if ctx.setting.has_text else k_text
        keys = Keys(k_rotated, v_text, k_visual, v_visual)
        grads = backward(d_out, q, keys, tables, out, lse, ctx.plan, ctx.setting)
        return *grads, None, None, None
