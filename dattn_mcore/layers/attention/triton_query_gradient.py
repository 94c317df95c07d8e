"""Triton kernel of the gradient of queries, from the merged output and log-sum-exp.

With p = exp(logit - lse), where lse is that over visual and text keys together, and
delta = sum(d_out * out), the gradient of a logit is p * (d_out . v - delta) for a key of either
set. So both sets of keys go through the same two kernels: this one per tile of queries (d q), and
`triton_key_gradient` per tile of keys (d k and d v). No sum is made by atomics: results do not
depend on timing.

Source: Dao, FlashAttention-2, arXiv 2307.08691, algorithm 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dattn_mcore.layers.attention.triton_tiles import (
    LOG2_E,
    edge_block,
    matmul,
    part_of,
    query,
    query_tile,
    raw_logits,
    row_ranges,
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


@triton.jit(do_not_specialize=["rows", "padded_rows"])
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
    d_visual,  # float32 [parts, padded rows, HEADS, HEAD_DIM]: d q through visual keys
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
    SPLIT: tl.constexpr,
    HAS_VISUAL: tl.constexpr,
    HAS_TEXT: tl.constexpr,
    DEBIASED: tl.constexpr,
    HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of one query tile, apart for visual and text keys, whose queries differ."""
    group, columns = tl.program_id(1), tl.arange(0, HEAD_DIM)
    tile, row, head, real, lines = query_tile(
        q_rows, tiles, q_row_stride, q_head_stride, RATIO, BLOCK_M
    )
    q = query(lines, row, real, columns, tables, padded_rows, HEAD_DIM, not DEBIASED)
    at = row.to(tl.int64) * HEADS + head
    element = at[:, None] * HEAD_DIM + columns[None, :]
    out = tl.load(out_rows + element, mask=real[:, None], other=0.0)
    d_out = tl.load(d_out_rows + element, mask=real[:, None], other=0.0)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    tl.store(delta_rows + at, delta, mask=real)  # every part writes the same
    lse = tl.load(lse_rows + at, mask=real, other=0.0) * LOG2_E
    # A row that sees nothing has lse of minus infinity, and weights that are masked to zero.
    lse = tl.where(lse == float("-inf"), 0.0, lse)

    if HAS_VISUAL:
        low, high = row_ranges(bounds, rows, row, real)
        tile_low, tile_high = part_of(tl.load(tile + 2), tl.load(tile + 5), BLOCK_N, SPLIT)
        d_q = _query_gradient(
            *(q, d_out, lse, delta),
            visual_keys + group * visual_key_group,
            visual_values + group * visual_value_group,
            *(visual_key_stride, visual_value_stride),
            *(tile_low, tl.load(tile + 3), tl.load(tile + 4), tile_high),
            *(low, high, multiplier, cap_scale, columns),
            *(BLOCK_M, HEAD_DIM, HAS_CAP, BLOCK_N, PRECISION),
        )
        part = tl.program_id(2).to(tl.int64) * padded_rows * HEADS * HEAD_DIM
        tl.store(d_visual + part + element, d_q * scale, mask=real[:, None])
    if HAS_TEXT and (not SPLIT or tl.program_id(2) == tl.num_programs(2) - 1):
        if DEBIASED:
            # Not before: the tile must not take shared memory twice in the visual loop.
            q = query(lines, row, real, columns, tables, padded_rows, HEAD_DIM, True)
        low, high = row_ranges(bounds + 2 * rows, rows, row, real)
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
