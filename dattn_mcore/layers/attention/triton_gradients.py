"""Launches the Triton kernels of the backward pass; see `triton_query_gradient`."""

from __future__ import annotations

import torch
import triton

from dattn_mcore.layers.attention.triton_key_gradient import key_kernel
from dattn_mcore.layers.attention.triton_launch import (
    first_that_fits,
    precision,
    query_arguments,
    query_grid,
    rotated,
)
from dattn_mcore.layers.attention.triton_plan import Keys, Plan, Setting
from dattn_mcore.layers.attention.triton_query_gradient import query_kernel
from dattn_mcore.layers.attention.triton_tuning import Blocks, fitted, splits
from dattn_mcore.layers.attention.visible_ranges import Ranges


def backward(
    d_out: torch.Tensor,
    q: torch.Tensor,
    keys: Keys,
    tables: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: Plan,
    setting: Setting,
) -> tuple[torch.Tensor, ...]:
    """Gradients of q, text keys and values, visual keys and values; None for an absent set."""
    d_out = d_out.contiguous()
    delta = torch.empty_like(lse)
    d_q = _query_gradient(d_out, delta, q, keys, tables, out, lse, plan, setting)
    d_text = d_text_values = d_visual = d_visual_values = None
    q_rotated = rotated(q, tables) if setting.has_text or not setting.debiased else q
    shared = (d_out, lse, delta, plan, setting)
    if setting.has_text:
        d_rotated, d_text_values = _key_gradients(
            "text", q_rotated, keys.text, keys.text_values, *shared
        )
        d_text = rotated(d_rotated, tables, -1.0)
    if setting.has_visual:
        asking = q if setting.debiased else q_rotated
        d_visual, d_visual_values = _key_gradients(
            "visual", asking, keys.visual, keys.visual_values, *shared
        )
    return d_q, d_text, d_text_values, d_visual, d_visual_values  # type: ignore[return-value]


def _query_gradient(
    d_out: torch.Tensor,
    delta: torch.Tensor,
    q: torch.Tensor,
    keys: Keys,
    tables: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: Plan,
    setting: Setting,
) -> torch.Tensor:
    """Gradient of q; fills delta."""
    through_text = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    through_visual = through_text

    def launch(blocks: Blocks) -> None:
        nonlocal through_visual
        blocks, tiles, parts = query_grid(q, keys, plan, setting, blocks)
        if setting.has_visual:
            through_visual = through_text.new_empty((parts, *q.shape))
        query_kernel[(len(tiles), keys.text.shape[1], parts)](
            q_rows=q,
            out_rows=out,
            lse_rows=lse,
            d_out_rows=d_out,
            delta_rows=delta,
            d_visual=through_visual,
            d_text=through_text,
            tiles=tiles,
            scale=setting.scale,
            SPLIT=parts > 1,
            **keys.pointers(),
            **query_arguments(q, keys, tables, plan, setting, blocks),
        )

    if plan.rows:
        first_that_fits("query", setting.tuning.query, q, launch)
    real = slice(0, plan.rows)
    d_q = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    if not plan.rows:
        return d_q
    visual = None
    if setting.has_visual:
        visual = through_visual[0] if len(through_visual) == 1 else through_visual.sum(0)
    if setting.has_text:
        total = through_text
        if visual is not None and not setting.debiased:
            total, visual = total + visual, None
        d_q[real] = rotated(
            total[real], tables, -1.0, None if visual is None else visual[real], q.dtype
        )
    elif visual is not None:
        d_q[real] = (
            visual[real].to(q.dtype)
            if setting.debiased
            else rotated(visual[real], tables, -1.0, dtype=q.dtype)
        )
    return d_q


def _key_gradients(
    kind: str,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    d_out: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    plan: Plan,
    setting: Setting,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of one set of keys and values; keys in the frame in which they were given."""
    count, groups, _ = keys.shape
    heads = q.shape[1]
    ratio = heads // groups
    ranges: Ranges = getattr(plan, kind)
    bounds = plan.bounds()[0 if kind == "visual" else 2 :]
    results: list[torch.Tensor] = []

    def launch(blocks: Blocks) -> None:
        blocks = fitted(blocks, max(plan.lengths, default=1) * ratio, ratio)
        tiles = plan.key_tiles(kind, blocks.keys)
        most = triton.cdiv(max(plan.lengths) * ratio, blocks.queries)
        parts = setting.tuning.key_splits or splits(len(tiles) * groups, most, q.device)
        dtype = keys.dtype if parts == 1 else torch.float32
        shape = (parts, *keys.shape)
        grads = [torch.empty(shape, dtype=dtype, device=q.device) for _ in range(2)]
        key_kernel[(len(tiles), groups, parts)](
            *(q, keys, values, tiles, bounds[0], bounds[1], lse, delta, d_out, *grads, count),
            *(q.stride(0), q.stride(1)),
            *(keys.stride(0), keys.stride(1), values.stride(0), values.stride(1)),
            scale=setting.scale,
            HEADS=heads,
            RATIO=ratio,
            HEAD_DIM=q.shape[2],
            BLOCK_M=blocks.queries,
            BLOCK_N=blocks.keys,
            SPLIT=parts > 1,
            PRECISION=precision(q),
            num_warps=blocks.warps,
            num_stages=blocks.stages,
            **setting.logits(),
        )
        results[:] = [g[0] if parts == 1 else g.sum(0).to(keys.dtype) for g in grads]

    real = sum(ranges.key_lengths)
    if real and plan.rows:
        first_that_fits("key", setting.tuning.key, q, launch)
        for grad in results:
            grad[real:] = 0
        return results[0], results[1]
    zeros = torch.zeros(keys.shape, dtype=keys.dtype, device=keys.device)
    return zeros, torch.zeros_like(zeros)
