"""Triton kernel of the gradients of keys and values of one set; see `triton_query_gradient`."""

from __future__ import annotations

import triton
import triton.language as tl

from dattn_mcore.layers.attention.triton_tiles import (
    LOG2_E,
    edge_block,
    matmul,
    part_of,
    raw_logits,
    whole_blocks,
)


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


# The rows of `bounds` stand at any address.
@triton.jit(
    do_not_specialize=["padded_keys"], do_not_specialize_on_alignment=["low_rows", "high_rows"]
)
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
    d_keys,  # [parts, padded_keys, groups, HEAD_DIM]
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
    SPLIT: tl.constexpr,
    HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of one tile of keys and values, from all query lines of its group that see it."""
    group = tl.program_id(1)
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
    low, high = part_of(tl.load(tile + 2) * RATIO, tl.load(tile + 5) * RATIO, BLOCK_M, SPLIT)
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
    at = (
        (tl.program_id(2).to(tl.int64) * padded_keys + wide) * groups + group
    ) * HEAD_DIM + columns[None, :]
    tl.store(d_keys + at, (d_k * scale).to(d_keys.dtype.element_ty), mask=real)
    tl.store(d_values + at, d_v.to(d_values.dtype.element_ty), mask=real)
