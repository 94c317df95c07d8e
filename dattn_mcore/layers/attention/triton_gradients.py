"""Launches the Triton kernels of the backward pass; see `triton_query_gradient`."""

from __future__ import annotations

import functools

import torch
import triton

from dattn_mcore.layers.attention.triton_key_gradient import key_kernel
from dattn_mcore.layers.attention.triton_launch import (
    asking,
    first_that_fits,
    precision,
    query_arguments,
    query_grid,
    rotated,
)
from dattn_mcore.layers.attention.triton_query_gradient import query_kernel
from dattn_mcore.layers.attention.triton_schedule import KeyKind, Keys, Schedule, Setting
from dattn_mcore.layers.attention.triton_tuning import Blocks, fitted, splits


def backward(
    d_out: torch.Tensor,
    q: torch.Tensor,
    keys: Keys,
    tables: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    schedule: Schedule,
    setting: Setting,
) -> tuple[torch.Tensor, ...]:
    """Gradients of q, rotated text keys, their values, visual keys and values; None for no set."""
    d_out, out = d_out.contiguous(), out.contiguous()  # the kernels take them to be so
    delta = torch.empty_like(lse)
    q_visual, q_text = asking(q, tables, setting)
    d_q = _query_gradient(
        d_out=d_out,
        delta=delta,
        q=q_visual,
        q_rotated=q_text,
        keys=keys,
        tables=tables,
        out=out,
        lse=lse,
        schedule=schedule,
        setting=setting,
    )
    d_rotated = d_text_values = d_visual = d_visual_values = None
    of_keys = functools.partial(
        _key_gradients, d_out=d_out, lse=lse, delta=delta, schedule=schedule, setting=setting
    )
    if setting.has_text:
        d_rotated, d_text_values = of_keys(
            "text", q=q_text, keys=keys.text, values=keys.text_values
        )
    if setting.has_visual:
        d_visual, d_visual_values = of_keys(
            "visual", q=q_visual, keys=keys.visual, values=keys.visual_values
        )
    return d_q, d_rotated, d_text_values, d_visual, d_visual_values  # type: ignore[return-value]


def _query_gradient(
    *,
    d_out: torch.Tensor,
    delta: torch.Tensor,
    q: torch.Tensor,
    q_rotated: torch.Tensor,
    keys: Keys,
    tables: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    schedule: Schedule,
    setting: Setting,
) -> torch.Tensor:
    """Gradient of q; fills delta."""
    through_text = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    through_visual = through_text

    def launch(blocks: Blocks) -> None:
        nonlocal through_visual
        blocks, tiles, parts = query_grid(q, keys, schedule, setting, blocks)
        if setting.has_visual:
            through_visual = through_text.new_empty((parts, *q.shape))
        query_kernel[(len(tiles), keys.text.shape[1], parts)](
            q_rows=q,
            q_rotated=q_rotated,
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
            **query_arguments(q, keys, schedule, setting, blocks),
        )

    if schedule.rows:
        first_that_fits("query", setting.tuning.query, q, launch)
    real = slice(0, schedule.rows)
    d_q = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    if not schedule.rows:
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
    kind: KeyKind,
    *,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    d_out: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    schedule: Schedule,
    setting: Setting,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of one set of keys and values; keys in the frame in which they were given."""
    count, groups, _ = keys.shape
    heads = q.shape[1]
    ratio = heads // groups
    results: list[torch.Tensor] = []

    def launch(blocks: Blocks) -> None:
        blocks = fitted(blocks, max(schedule.lengths, default=1) * ratio, ratio)
        made = schedule.key_tiles(kind, blocks.keys)
        programs, most = len(made.tiles) * groups, triton.cdiv(made.most * ratio, blocks.queries)
        parts = setting.tuning.key_splits or splits(programs, most, q.device)
        dtype = keys.dtype if parts == 1 else torch.float32
        shape = (parts, *keys.shape)
        d_keys, d_values = (torch.empty(shape, dtype=dtype, device=q.device) for _ in range(2))
        key_kernel[(len(made.tiles), groups, parts)](
            q_rows=q,
            keys=keys,
            values=values,
            tiles=made.tiles,
            intervals=made.intervals,
            bounds=schedule.bounds(),
            lse_rows=lse,
            delta_rows=delta,
            d_out_rows=d_out,
            d_keys=d_keys,
            d_values=d_values,
            rows=schedule.rows,
            padded_keys=count,
            q_row_stride=q.stride(0),
            q_head_stride=q.stride(1),
            key_stride=keys.stride(0),
            key_group=keys.stride(1),
            value_stride=values.stride(0),
            value_group=values.stride(1),
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
        results[:] = [
            grad[0] if parts == 1 else grad.sum(0).to(keys.dtype) for grad in (d_keys, d_values)
        ]
        for grad in results:
            grad[made.keys :] = 0

    if schedule.rows and (kind == "text" or schedule.visual.most):
        first_that_fits("key", setting.tuning.key, q, launch)
        return results[0], results[1]
    zeros = torch.zeros(keys.shape, dtype=keys.dtype, device=keys.device)
    return zeros, torch.zeros_like(zeros)
