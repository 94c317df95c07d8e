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


@triton.jit
def _over_queries(
    d_k,
    d_v,
    k,
    v,
    key,
    interval,  # an entry of `KeyTiles.intervals`
    turn,  # its number among those of the tile
    q_rows,
    d_out_rows,
    lse_rows,
    delta_rows,
    bounds,
    rows,
    group,
    q_row_stride,
    q_head_stride,
    multiplier,
    cap_scale,
    columns,
    HEADS: tl.constexpr,
    RATIO: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What the query lines of an interval of rows add to the gradients of a tile of keys."""
    low_rows = bounds + tl.load(interval) * rows
    low, high = tl.load(interval + 1) * RATIO, tl.load(interval + 4) * RATIO
    full_low, full_high = tl.load(interval + 2) * RATIO, tl.load(interval + 3) * RATIO
    low, high = part_of(low, high, turn, BLOCK_M, SPLIT)
    start, stop = whole_blocks(low, full_low, full_high, high, BLOCK_M)
    for first in tl.range(start, stop, BLOCK_M):
        d_k, d_v = _key_step(
            d_k=d_k,
            d_v=d_v,
            k=k,
            v=v,
            key=key,
            q_rows=q_rows,
            d_out_rows=d_out_rows,
            lse_rows=lse_rows,
            delta_rows=delta_rows,
            low_rows=low_rows,
            high_rows=low_rows + rows,
            group=group,
            first=first,
            limit=stop,
            q_row_stride=q_row_stride,
            q_head_stride=q_head_stride,
            multiplier=multiplier,
            cap_scale=cap_scale,
            columns=columns,
            MASKED=False,
            HEADS=HEADS,
            RATIO=RATIO,
            HEAD_DIM=HEAD_DIM,
            HAS_CAP=HAS_CAP,
            BLOCK_M=BLOCK_M,
            PRECISION=PRECISION,
        )
    before = tl.cdiv(start - low, BLOCK_M)
    for index in tl.range(0, before + tl.cdiv(high - stop, BLOCK_M)):
        first, limit = edge_block(index, before, low, start, stop, high, BLOCK_M)
        d_k, d_v = _key_step(
            d_k=d_k,
            d_v=d_v,
            k=k,
            v=v,
            key=key,
            q_rows=q_rows,
            d_out_rows=d_out_rows,
            lse_rows=lse_rows,
            delta_rows=delta_rows,
            low_rows=low_rows,
            high_rows=low_rows + rows,
            group=group,
            first=first,
            limit=limit,
            q_row_stride=q_row_stride,
            q_head_stride=q_head_stride,
            multiplier=multiplier,
            cap_scale=cap_scale,
            columns=columns,
            MASKED=True,
            HEADS=HEADS,
            RATIO=RATIO,
            HEAD_DIM=HEAD_DIM,
            HAS_CAP=HAS_CAP,
            BLOCK_M=BLOCK_M,
            PRECISION=PRECISION,
        )
    return d_k, d_v


@triton.jit
def _keys_of(tile, BLOCK_N: tl.constexpr):
    """Keys [BLOCK_N] of a tile, and which are real, [BLOCK_N, 1]."""
    key = tl.load(tile, volatile=True) + tl.arange(0, BLOCK_N)
    return key, (key < tl.load(tile + 1, volatile=True))[:, None]


@triton.jit(do_not_specialize=["rows", "padded_keys"])
def key_kernel(
    q_rows,  # rotated where the keys are
    keys,
    values,
    tiles,  # `visible_ranges.KeyTiles`
    intervals,
    bounds,  # `Schedule.bounds`
    lse_rows,
    delta_rows,
    d_out_rows,
    d_keys,  # [parts, padded_keys, groups, HEAD_DIM]
    d_values,
    rows,
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
    tile = tiles + tl.program_id(0) * 4
    columns = tl.arange(0, HEAD_DIM)
    key, real = _keys_of(tile, BLOCK_N)
    wide = key.to(tl.int64)[:, None]
    k_tile = keys + group * key_group + wide * key_stride + columns[None, :]
    v_tile = values + group * value_group + wide * value_stride + columns[None, :]
    k = tl.load(k_tile, mask=real, other=0.0)
    v = tl.load(v_tile, mask=real, other=0.0)
    d_k = tl.zeros([BLOCK_N, HEAD_DIM], dtype=tl.float32)
    d_v = tl.zeros([BLOCK_N, HEAD_DIM], dtype=tl.float32)
    # A loop even where every tile has one interval: without it the compiler keeps more addresses,
    # and spills at head size 256.
    for index in tl.range(0, tl.load(tile + 3)):
        d_k, d_v = _over_queries(
            d_k=d_k,
            d_v=d_v,
            k=k,
            v=v,
            key=key,
            interval=intervals + (tl.load(tile + 2) + index) * 5,
            turn=index,
            q_rows=q_rows,
            d_out_rows=d_out_rows,
            lse_rows=lse_rows,
            delta_rows=delta_rows,
            bounds=bounds,
            rows=rows,
            group=group,
            q_row_stride=q_row_stride,
            q_head_stride=q_head_stride,
            multiplier=multiplier,
            cap_scale=cap_scale,
            columns=columns,
            HEADS=HEADS,
            RATIO=RATIO,
            HEAD_DIM=HEAD_DIM,
            HAS_CAP=HAS_CAP,
            BLOCK_M=BLOCK_M,
            SPLIT=SPLIT,
            PRECISION=PRECISION,
        )
    # Anew, see `query_tile`.
    key, real = _keys_of(tile, BLOCK_N)
    wide = key.to(tl.int64)[:, None]
    part = tl.program_id(2).to(tl.int64) * padded_keys
    at = ((part + wide) * (HEADS // RATIO) + group) * HEAD_DIM + columns[None, :]
    tl.store(d_keys + at, (d_k * scale).to(d_keys.dtype.element_ty), mask=real)
    tl.store(d_values + at, d_v.to(d_values.dtype.element_ty), mask=real)
