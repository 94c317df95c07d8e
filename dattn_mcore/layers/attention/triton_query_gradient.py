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
    query_lines,
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
    d_q,
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
    HAS_CAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds the gradient of a query tile through keys [tile_low, tile_high) of one set."""
    start, stop = whole_blocks(tile_low, tile_full_low, tile_full_high, tile_high, BLOCK_N)
    for first in tl.range(start, stop, BLOCK_N):
        d_q = _query_step(
            d_q=d_q,
            q=q,
            d_out=d_out,
            lse=lse,
            delta=delta,
            keys=keys,
            values=values,
            key_stride=key_stride,
            value_stride=value_stride,
            first=first,
            limit=stop,
            low=low,
            high=high,
            multiplier=multiplier,
            cap_scale=cap_scale,
            columns=columns,
            MASKED=False,
            HAS_CAP=HAS_CAP,
            BLOCK_N=BLOCK_N,
            PRECISION=PRECISION,
        )
    before = tl.cdiv(start - tile_low, BLOCK_N)
    for index in tl.range(0, before + tl.cdiv(tile_high - stop, BLOCK_N)):
        first, limit = edge_block(index, before, tile_low, start, stop, tile_high, BLOCK_N)
        d_q = _query_step(
            d_q=d_q,
            q=q,
            d_out=d_out,
            lse=lse,
            delta=delta,
            keys=keys,
            values=values,
            key_stride=key_stride,
            value_stride=value_stride,
            first=first,
            limit=limit,
            low=low,
            high=high,
            multiplier=multiplier,
            cap_scale=cap_scale,
            columns=columns,
            MASKED=True,
            HAS_CAP=HAS_CAP,
            BLOCK_N=BLOCK_N,
            PRECISION=PRECISION,
        )
    return d_q


@triton.jit(do_not_specialize=["rows", "padded_rows", "slots"])
def query_kernel(
    q_rows,  # as in the forward pass
    q_rotated,
    text_keys,  # rotated
    text_values,
    visual_keys,
    visual_values,
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
    slots,
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
    SEVERAL: tl.constexpr,  # slots; else there is one
    HAS_VISUAL: tl.constexpr,
    HAS_TEXT: tl.constexpr,
    HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of one query tile, apart for visual and text keys, whose queries differ."""
    group, columns = tl.program_id(1), tl.arange(0, HEAD_DIM)
    tile, row, head, real = query_tile(tiles, slots, RATIO, BLOCK_M)
    at = row.to(tl.int64) * HEADS + head
    out = query_lines(out_rows, row, head, real, HEADS * HEAD_DIM, HEAD_DIM, HEAD_DIM)
    d_out = query_lines(d_out_rows, row, head, real, HEADS * HEAD_DIM, HEAD_DIM, HEAD_DIM)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    tl.store(delta_rows + at, delta, mask=real)  # every part writes the same
    lse = tl.load(lse_rows + at, mask=real, other=0.0) * LOG2_E
    # A row that sees nothing has lse of minus infinity, and weights that are masked to zero.
    lse = tl.where(lse == float("-inf"), 0.0, lse)

    if HAS_VISUAL:
        q = query_lines(q_rows, row, head, real, q_row_stride, q_head_stride, HEAD_DIM)
        d_q = tl.zeros([BLOCK_M, HEAD_DIM], dtype=tl.float32)
        count = 1
        if SEVERAL:
            count = slots
        for slot in tl.range(0, count):
            ends = tile + 6 + 4 * slot
            low, high = row_ranges(bounds + (2 + 2 * slot) * rows, rows, row, real)
            tile_low, tile_high = part_of(tl.load(ends), tl.load(ends + 3), slot, BLOCK_N, SPLIT)
            d_q = _query_gradient(
                d_q=d_q,
                q=q,
                d_out=d_out,
                lse=lse,
                delta=delta,
                keys=visual_keys + group * visual_key_group,
                values=visual_values + group * visual_value_group,
                key_stride=visual_key_stride,
                value_stride=visual_value_stride,
                tile_low=tile_low,
                tile_full_low=tl.load(ends + 1),
                tile_full_high=tl.load(ends + 2),
                tile_high=tile_high,
                low=low,
                high=high,
                multiplier=multiplier,
                cap_scale=cap_scale,
                columns=columns,
                HAS_CAP=HAS_CAP,
                BLOCK_N=BLOCK_N,
                PRECISION=PRECISION,
            )
        tile, row, head, real = query_tile(tiles, slots, RATIO, BLOCK_M)
        at = (tl.program_id(2).to(tl.int64) * padded_rows + row) * HEADS + head
        element = at[:, None] * HEAD_DIM + columns[None, :]
        tl.store(d_visual + element, d_q * scale, mask=real[:, None])
    if HAS_TEXT and (not SPLIT or tl.program_id(2) == tl.num_programs(2) - 1):
        tile, row, head, real = query_tile(tiles, slots, RATIO, BLOCK_M)
        # Not before: the tile must not take shared memory twice in the visual loop.
        q = query_lines(q_rotated, row, head, real, HEADS * HEAD_DIM, HEAD_DIM, HEAD_DIM)
        d_q = tl.zeros([BLOCK_M, HEAD_DIM], dtype=tl.float32)
        low, high = row_ranges(bounds, rows, row, real)
        d_q = _query_gradient(
            d_q=d_q,
            q=q,
            d_out=d_out,
            lse=lse,
            delta=delta,
            keys=text_keys + group * text_key_group,
            values=text_values + group * text_value_group,
            key_stride=text_key_stride,
            value_stride=text_value_stride,
            tile_low=tl.load(tile + 2),
            tile_full_low=tl.load(tile + 3),
            tile_full_high=tl.load(tile + 4),
            tile_high=tl.load(tile + 5),
            low=low,
            high=high,
            multiplier=multiplier,
            cap_scale=cap_scale,
            columns=columns,
            HAS_CAP=HAS_CAP,
            BLOCK_N=BLOCK_N,
            PRECISION=PRECISION,
        )
        _, row, head, real = query_tile(tiles, slots, RATIO, BLOCK_M)
        at = row.to(tl.int64) * HEADS + head
        element = at[:, None] * HEAD_DIM + columns[None, :]
        tl.store(d_text + element, d_q * scale, mask=real[:, None])
