"""Triton kernels of the forward pass: one online softmax over visual and then text keys.

A program runs over the visual keys with the query as the mode has it, loads the rotated query, and
goes on over the causal text keys, into the same running maximum, sum and output. Queries are
rotated before, as keys are: rotated in the program, they stayed in its registers, which do not
suffice at head size 256 (docs/performance.md).
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
def _accumulate(
    out,
    top,
    total,
    q,
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
    """One block of keys [first, first + BLOCK_N) below `limit` into the online softmax."""
    offsets = tl.arange(0, BLOCK_N)
    key_tile = keys + tl.cast(first, tl.int64) * key_stride
    key_tile += offsets[None, :] * key_stride + columns[:, None]
    value_tile = values + tl.cast(first, tl.int64) * value_stride
    value_tile += offsets[:, None] * value_stride + columns[None, :]
    if MASKED:
        inside = first + offsets < limit
        k = tl.load(key_tile, mask=inside[None, :], other=0.0)
        v = tl.load(value_tile, mask=inside[:, None], other=0.0)
    else:
        k = tl.load(key_tile)
        v = tl.load(value_tile)
    logits = raw_logits(matmul(q, k, None, PRECISION), cap_scale, HAS_CAP)
    if MASKED:
        key = (first + offsets)[None, :]
        visible = (key >= low[:, None]) & (key < tl.minimum(high, limit)[:, None])
        logits = tl.where(visible, logits, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, 1) * multiplier)
    # A line that has seen nothing yet has no maximum; zero keeps infinities out of differences.
    base = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
    weights = tl.exp2(logits * multiplier - base[:, None])
    decay = tl.exp2(top - base)
    total = total * decay + tl.sum(weights, 1)
    out = matmul(weights.to(v.dtype), v, out * decay[:, None], PRECISION)
    return out, new_top, total


@triton.jit
def _over_keys(
    out,
    top,
    total,
    q,
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
    """All keys [tile_low, tile_high) of one set: whole blocks first, then the edges, masked."""
    start, stop = whole_blocks(tile_low, tile_full_low, tile_full_high, tile_high, BLOCK_N)
    for first in tl.range(start, stop, BLOCK_N):
        out, top, total = _accumulate(
            out=out,
            top=top,
            total=total,
            q=q,
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
        out, top, total = _accumulate(
            out=out,
            top=top,
            total=total,
            q=q,
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
    return out, top, total


@triton.jit(do_not_specialize=["rows", "padded_rows", "slots"])
def forward_kernel(
    q_rows,  # as they meet visual keys
    q_rotated,  # contiguous, as they meet text keys
    text_keys,  # rotated
    text_values,
    visual_keys,
    visual_values,
    tiles,  # see `query_tile`
    bounds,  # `Schedule.bounds`
    out_rows,  # [parts, padded rows, HEADS, HEAD_DIM]
    lse_rows,  # float32 [parts, padded rows, HEADS], natural logarithm
    rows,
    padded_rows,
    slots,  # ranges of visual keys of a row
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
    multiplier,  # from raw logits to base 2
    cap_scale,
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
    """Output and log-sum-exp of one query tile, one group and one part of the visual keys."""
    group, columns = tl.program_id(1), tl.arange(0, HEAD_DIM)
    out = tl.zeros([BLOCK_M, HEAD_DIM], dtype=tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    if HAS_VISUAL:
        tile, row, head, real = query_tile(tiles, slots, RATIO, BLOCK_M)
        q = query_lines(q_rows, row, head, real, q_row_stride, q_head_stride, HEAD_DIM)
        count = 1
        if SEVERAL:
            count = slots
        for slot in tl.range(0, count):
            ends = tile + 6 + 4 * slot
            low, high = row_ranges(bounds + (2 + 2 * slot) * rows, rows, row, real)
            tile_low, tile_high = part_of(tl.load(ends), tl.load(ends + 3), slot, BLOCK_N, SPLIT)
            out, top, total = _over_keys(
                out=out,
                top=top,
                total=total,
                q=q,
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
    if HAS_TEXT and (not SPLIT or tl.program_id(2) == tl.num_programs(2) - 1):
        tile, row, head, real = query_tile(tiles, slots, RATIO, BLOCK_M)
        # Not before: the tile must not take shared memory twice in the visual loop.
        q = query_lines(q_rotated, row, head, real, HEADS * HEAD_DIM, HEAD_DIM, HEAD_DIM)
        low, high = row_ranges(bounds, rows, row, real)
        out, top, total = _over_keys(
            out=out,
            top=top,
            total=total,
            q=q,
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
    sees = total > 0
    total = tl.where(sees, total, 1.0)
    out = out / total[:, None]
    lse = tl.where(sees, (top + tl.log2(total)) / LOG2_E, float("-inf"))
    _, row, head, real = query_tile(tiles, slots, RATIO, BLOCK_M)
    at = (tl.program_id(2).to(tl.int64) * padded_rows + row) * HEADS + head
    tl.store(lse_rows + at, lse, mask=real)
    tl.store(
        out_rows + at[:, None] * HEAD_DIM + columns[None, :],
        out.to(out_rows.dtype.element_ty),
        mask=real[:, None],
    )


@triton.jit(do_not_specialize=["part_lines", "lines", "parts"])
def combine_kernel(
    out_parts,  # float32 [parts, part_lines, HEAD_DIM]
    lse_parts,  # float32 [parts, part_lines]
    out_lines,
    lse_lines,
    part_lines,  # lines of a part, padding included
    lines,
    parts,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merges the parts of a split visual loop by their log-sum-exps, in a fixed order."""
    line, columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, HEAD_DIM)
    real = line < lines
    top = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    for index in tl.range(0, parts):
        at = tl.cast(index, tl.int64) * part_lines + line
        top = tl.maximum(top, tl.load(lse_parts + at, mask=real, other=float("-inf")))
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    out = tl.zeros([BLOCK, HEAD_DIM], dtype=tl.float32)
    for index in tl.range(0, parts):
        at = tl.cast(index, tl.int64) * part_lines + line
        lse = tl.load(lse_parts + at, mask=real, other=float("-inf"))
        weight = tl.exp2((lse - base) * LOG2_E)
        part = tl.load(
            out_parts + at[:, None] * HEAD_DIM + columns[None, :], mask=real[:, None], other=0.0
        )
        total += weight
        out += weight[:, None] * part
    sees = total > 0
    total = tl.where(sees, total, 1.0)
    out = out / total[:, None]
    tl.store(lse_lines + line, tl.where(sees, base + tl.log(total), float("-inf")), mask=real)
    tl.store(
        out_lines + line.to(tl.int64)[:, None] * HEAD_DIM + columns[None, :],
        out.to(out_lines.dtype.element_ty),
        mask=real[:, None],
    )
