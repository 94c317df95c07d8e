"""Triton kernels of the backward pass, from the merged output and log-sum-exp.

With p = exp(logit - lse), where lse is that over visual and text keys together, and
delta = sum(d_out * out), the gradient of a logit is p * (d_out . v - delta) for a key of either
set. So both sets of keys go through the same two kernels: one per tile of queries (d q), one per
tile of keys (d k and d v). No sum is made by atomics: results do not depend on timing.

Source: Dao, FlashAttention-2, arXiv 2307.08691, algorithm 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dattn_mcore.layers.attention.triton_forward import (
    LOG2_E,
    edge_block,
    matmul,
    raw_logits,
    rotated_tile,
    whole_blocks,
)


@triton.jit
def _query_step(
    d_q,
    q,
    d_out,
    lse,
    delta,
    keys,
    values,
    key_stride,
    value_stride,
    first,
    limit,
    low,
    high,
    multiplier,
    cap_scale,
    columns,
    MASKED: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What one block of keys adds to the gradient of a query tile."""
    offsets = tl.arange(0, BLOCK_N)
    key_tile = keys + tl.cast(first, tl.int64) * key_stride
    key_tile += offsets[:, None] * key_stride + columns[None, :]
    value_tile = values + tl.cast(first, tl.int64) * value_stride
    value_tile += offsets[:, None] * value_stride + columns[None, :]
    if MASKED:
        inside = (first + offsets < limit)[:, None]
        k = tl.load(key_tile, mask=inside, other=0.0)
        v = tl.load(value_tile, mask=inside, other=0.0)
    else:
        k = tl.load(key_tile)
        v = tl.load(value_tile)
    logits = raw_logits(matmul(q, tl.trans(k), None, PRECISION), cap_scale, HAS_CAP)
    weights = tl.exp2(logits * multiplier - lse[:, None])
    if MASKED:
        key = (first + offsets)[None, :]
        visible = (key >= low[:, None]) & (key < tl.minimum(high, limit)[:, None])
        weights = tl.where(visible, weights, 0.0)
    d_logits = weights * (matmul(d_out, tl.trans(v), None, PRECISION) - delta[:, None])
    if HAS_CAP:
        d_logits *= 1.0 - logits * logits
    return matmul(d_logits.to(k.dtype), k, d_q, PRECISION)


@triton.jit
def _query_gradient(
    q,
    d_out,
    lse,
    delta,
    keys,
    values,
    key_stride,
    value_stride,
    tile_low,
    tile_full_low,
    tile_full_high,
    tile_high,
    low,
    high,
    multiplier,
    cap_scale,
    columns,
    BLOCK_M: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of a query tile through all keys [tile_low, tile_high) of one set."""
    d_q = tl.zeros([BLOCK_M, HEAD_DIM], dtype=tl.float32)
    start, stop = whole_blocks(tile_low, tile_full_low, tile_full_high, tile_high, BLOCK_N)
    for first in tl.range(start, stop, BLOCK_N):
        d_q = _query_step(
            *(d_q, q, d_out, lse, delta, keys, values, key_stride, value_stride, first, stop),
            *(low, high, multiplier, cap_scale, columns, False, HAS_CAP, BLOCK_N, PRECISION),
        )
    before = tl.cdiv(start - tile_low, BLOCK_N)
    for index in tl.range(0, before + tl.cdiv(tile_high - stop, BLOCK_N)):
        first, limit = edge_block(index, before, tile_low, start, stop, tile_high, BLOCK_N)
        d_q = _query_step(
            *(d_q, q, d_out, lse, delta, keys, values, key_stride, value_stride, first, limit),
            *(low, high, multiplier, cap_scale, columns, True, HAS_CAP, BLOCK_N, PRECISION),
        )
    return d_q


@triton.jit
def query_kernel(
    q_rows,
    text_keys,  # rotated
    text_values,
    visual_keys,
    visual_values,
    tables,  # see `rotated_tile`
    tiles,  # as in the forward pass
    bounds,
    out_rows,
    lse_rows,
    d_out_rows,
    delta_rows,  # float32 [rows, HEADS], written here for the key kernel
    d_visual,  # float32 [SPLITS, rows, HEADS, HEAD_DIM]: d q through visual keys
    d_text,  # float32 [rows, HEADS, HEAD_DIM]: d (rotated q) through text keys
    rows,
    padded_rows,
    q_row_stride,
    q_head_stride,
    text_key_stride,
    text_value_stride,
    visual_key_stride,
    visual_value_stride,
    text_key_group,
    text_value_group,
    visual_key_group,
    visual_value_group,
    multiplier,
    cap_scale,
    scale,
    HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_VISUAL: tl.constexpr,
    HAS_TEXT: tl.constexpr,
    DEBIASED: tl.constexpr,
    HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of one query tile, apart for visual and text keys, whose queries differ."""
    group, split = tl.program_id(1), tl.program_id(2)
    tile = tiles + tl.program_id(0) * 10
    first_row, stop_row = tl.load(tile), tl.load(tile + 1)
    line, columns = tl.arange(0, BLOCK_M), tl.arange(0, HEAD_DIM)
    row, head = first_row + line // RATIO, group * RATIO + line % RATIO
    real = row < stop_row
    q_line = q_rows + row.to(tl.int64) * q_row_stride + head * q_head_stride
    q = tl.load(q_line[:, None] + columns[None, :], mask=real[:, None], other=0.0)
    at = row.to(tl.int64) * HEADS + head
    element = at[:, None] * HEAD_DIM + columns[None, :]
    out = tl.load(out_rows + element, mask=real[:, None], other=0.0)
    d_out = tl.load(d_out_rows + element, mask=real[:, None], other=0.0)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    tl.store(delta_rows + at, delta, mask=real)  # every split writes the same
    lse = tl.load(lse_rows + at, mask=real, other=0.0) * LOG2_E
    # A row that sees nothing has lse of minus infinity, and weights that are masked to zero.
    lse = tl.where(lse == float("-inf"), 0.0, lse)

    if not DEBIASED:
        q = rotated_tile(*(q_line, row, real, columns, tables, padded_rows, HEAD_DIM, 1.0)).to(
            q.dtype
        )
    if HAS_VISUAL:
        low = tl.load(bounds + row, mask=real, other=0)
        high = tl.load(bounds + rows + row, mask=real, other=0)
        tile_low, tile_high = tl.load(tile + 2), tl.load(tile + 5)
        if SPLITS > 1:
            share = tl.cdiv(tl.cdiv(tile_high - tile_low, BLOCK_N), SPLITS) * BLOCK_N
            tile_low = tile_low + split * share
            tile_high = tl.minimum(tile_low + share, tile_high)
            tile_high = tl.maximum(tile_low, tile_high)
        d_q = _query_gradient(
            *(q, d_out, lse, delta),
            visual_keys + group * visual_key_group,
            visual_values + group * visual_value_group,
            *(visual_key_stride, visual_value_stride),
            *(tile_low, tl.load(tile + 3), tl.load(tile + 4), tile_high),
            *(low, high, multiplier, cap_scale, columns),
            *(BLOCK_M, HEAD_DIM, HAS_CAP, BLOCK_N, PRECISION),
        )
        part = (split * padded_rows).to(tl.int64) * HEADS * HEAD_DIM
        tl.store(d_visual + part + element, d_q * scale, mask=real[:, None])
    if HAS_TEXT and (SPLITS == 1 or split == SPLITS - 1):
        if DEBIASED:
            # Not before: the tile must not take shared memory twice in the visual loop.
            q = rotated_tile(*(q_line, row, real, columns, tables, padded_rows, HEAD_DIM, 1.0)).to(
                q.dtype
            )
        low = tl.load(bounds + 2 * rows + row, mask=real, other=0)
        high = tl.load(bounds + 3 * rows + row, mask=real, other=0)
        d_q = _query_gradient(
            *(q, d_out, lse, delta),
            text_keys + group * text_key_group,
            text_values + group * text_value_group,
            *(text_key_stride, text_value_stride),
            *(tl.load(tile + 6), tl.load(tile + 7), tl.load(tile + 8), tl.load(tile + 9)),
            *(low, high, multiplier, cap_scale, columns),
            *(BLOCK_M, HEAD_DIM, HAS_CAP, BLOCK_N, PRECISION),
        )
        tl.store(d_text + element, d_q * scale, mask=real[:, None])


@triton.jit
def _key_step(
    d_k,
    d_v,
    k,
    v,
    key,
    q_rows,
    d_out_rows,
    lse_rows,
    delta_rows,
    low_rows,
    high_rows,
    group,
    first,
    limit,
    q_row_stride,
    q_head_stride,
    multiplier,
    cap_scale,
    columns,
    MASKED: tl.constexpr,
    HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What query lines [first, first + BLOCK_M) below `limit` add to the gradients of keys."""
    line = first + tl.arange(0, BLOCK_M)
    real = line < limit
    row, head = (line // RATIO).to(tl.int64), group * RATIO + line % RATIO
    at = row * HEADS + head
    q_tile = q_rows + (row * q_row_stride + head * q_head_stride)[:, None] + columns[None, :]
    d_out_tile = d_out_rows + at[:, None] * HEAD_DIM + columns[None, :]
    if MASKED:
        q = tl.load(q_tile, mask=real[:, None], other=0.0)
        d_out = tl.load(d_out_tile, mask=real[:, None], other=0.0)
        lse = tl.load(lse_rows + at, mask=real, other=0.0) * LOG2_E
        lse = tl.where(lse == float("-inf"), 0.0, lse)
        delta = tl.load(delta_rows + at, mask=real, other=0.0)
    else:
        q = tl.load(q_tile)
        d_out = tl.load(d_out_tile)
        lse = tl.load(lse_rows + at) * LOG2_E
        delta = tl.load(delta_rows + at)
    logits = raw_logits(matmul(k, tl.trans(q), None, PRECISION), cap_scale, HAS_CAP)
    weights = tl.exp2(logits * multiplier - lse[None, :])
    if MASKED:
        low = tl.load(low_rows + row, mask=real, other=0)[None, :]
        high = tl.load(high_rows + row, mask=real, other=0)[None, :]
        weights = tl.where((key[:, None] >= low) & (key[:, None] < high), weights, 0.0)
    d_v = matmul(weights.to(d_out.dtype), d_out, d_v, PRECISION)
    d_logits = matmul(v, tl.trans(d_out), None, PRECISION) - delta[None, :]
    d_logits *= weights
    if HAS_CAP:
        d_logits *= 1.0 - logits * logits
    d_k = matmul(d_logits.to(q.dtype), q, d_k, PRECISION)
    return d_k, d_v


@triton.jit
def key_kernel(
    q_rows,  # rotated where the keys are
    keys,
    values,
    tiles,  # `visible_ranges.key_tiles`
    low_rows,  # int32 [rows]
    high_rows,
    lse_rows,
    delta_rows,
    d_out_rows,
    d_keys,  # [SPLITS, padded_keys, groups, HEAD_DIM]
    d_values,
    padded_keys,
    q_row_stride,
    q_head_stride,
    key_stride,
    key_group,
    value_stride,
    value_group,
    multiplier,
    cap_scale,
    scale,
    HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of one tile of keys and values, from all query lines of its group that see it."""
    group, split = tl.program_id(1), tl.program_id(2)
    tile = tiles + tl.program_id(0) * 6
    first_key, stop_key = tl.load(tile), tl.load(tile + 1)
    columns = tl.arange(0, HEAD_DIM)
    key = first_key + tl.arange(0, BLOCK_N)
    real = (key < stop_key)[:, None]
    wide = key.to(tl.int64)[:, None]
    k = tl.load(
        keys + group * key_group + wide * key_stride + columns[None, :], mask=real, other=0.0
    )
    v = tl.load(
        values + group * value_group + wide * value_stride + columns[None, :], mask=real, other=0.0
    )
    low, high = tl.load(tile + 2) * RATIO, tl.load(tile + 5) * RATIO
    if SPLITS > 1:
        share = tl.cdiv(tl.cdiv(high - low, BLOCK_M), SPLITS) * BLOCK_M
        low = low + split * share
        high = tl.maximum(low, tl.minimum(low + share, high))
    start, stop = whole_blocks(
        *(low, tl.load(tile + 3) * RATIO, tl.load(tile + 4) * RATIO, high, BLOCK_M)
    )
    d_k = tl.zeros([BLOCK_N, HEAD_DIM], dtype=tl.float32)
    d_v = tl.zeros([BLOCK_N, HEAD_DIM], dtype=tl.float32)
    for first in tl.range(start, stop, BLOCK_M):
        d_k, d_v = _key_step(
            *(d_k, d_v, k, v, key, q_rows, d_out_rows, lse_rows, delta_rows, low_rows, high_rows),
            *(group, first, stop, q_row_stride, q_head_stride, multiplier, cap_scale, columns),
            *(False, HEADS, RATIO, HEAD_DIM, HAS_CAP, BLOCK_M, PRECISION),
        )
    before = tl.cdiv(start - low, BLOCK_M)
    for index in tl.range(0, before + tl.cdiv(high - stop, BLOCK_M)):
        first, limit = edge_block(index, before, low, start, stop, high, BLOCK_M)
        d_k, d_v = _key_step(
            *(d_k, d_v, k, v, key, q_rows, d_out_rows, lse_rows, delta_rows, low_rows, high_rows),
            *(group, first, limit, q_row_stride, q_head_stride, multiplier, cap_scale, columns),
            *(True, HEADS, RATIO, HEAD_DIM, HAS_CAP, BLOCK_M, PRECISION),
        )
    groups = HEADS // RATIO
    at = ((split * padded_keys + wide) * groups + group) * HEAD_DIM + columns[None, :]
    tl.store(d_keys + at, (d_k * scale).to(d_keys.dtype.element_ty), mask=real)
    tl.store(d_values + at, d_v.to(d_values.dtype.element_ty), mask=real)
