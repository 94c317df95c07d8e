"""Triton kernels of the forward pass: one online softmax over visual and then text keys.

A program owns a tile of query rows in which the query heads of a group are packed: line `i` of a
tile is query head `i % RATIO` of text row `i // RATIO`. So all lines share their keys. It runs
over the visual keys with the query as it is, rotates the query in registers, and goes on over the
causal text keys, into the same running maximum, sum and output.

Key blocks that every line sees whole are taken without a mask. Logits are kept to base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def raw_logits(products, cap_scale, HAS_CAP: tl.constexpr):
    """Products q k^T, or tanh(products * cap_scale) where logits are capped."""
    if HAS_CAP:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1); exp may overflow to infinity, which gives 1.
        return 1.0 - 2.0 / (tl.exp2(products * (cap_scale * 2.0 * LOG2_E)) + 1.0)
    return products


@triton.jit
def matmul(a, b, total, PRECISION: tl.constexpr):
    """Adds a b to total (None for zero), in float32.

    The interpreter multiplies no bfloat16: there, 16-bit factors are widened, which is exact.
    """
    if PRECISION == "widened":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def whole_blocks(low, full_low, full_high, high, STEP: tl.constexpr):
    """The part [start, stop) of [low, high) that whole blocks cover without a mask."""
    start = tl.minimum(tl.maximum(full_low, low), high)
    stop = start + tl.maximum(tl.minimum(full_high, high) - start, 0) // STEP * STEP
    return start, stop


@triton.jit
def edge_block(index, before, low, start, stop, high, STEP: tl.constexpr):
    """First key and limit of masked block `index`; `before` of them precede the whole ones."""
    ahead = index < before
    first = tl.where(ahead, low + index * STEP, stop + (index - before) * STEP)
    return first, tl.where(ahead, start, high)


@triton.jit
def rotated_tile(
    source, row, real, columns, tables, rows, HEAD_DIM: tl.constexpr, SIGN: tl.constexpr
):
    """Loads lines at pointers `source` and rotates them in float32 (GPT-NeoX style).

    tables: float32 [2, rows, HEAD_DIM], cosines and sines of the angles of each row; sines of the
    first half negative, so that a column needs only itself and its partner in the other half.
    """
    partner = (columns + HEAD_DIM // 2) % HEAD_DIM
    x = tl.load(source[:, None] + columns[None, :], mask=real[:, None], other=0.0).to(tl.float32)
    y = tl.load(source[:, None] + partner[None, :], mask=real[:, None], other=0.0).to(tl.float32)
    table = tables + row[:, None] * HEAD_DIM + columns[None, :]
    cosine = tl.load(table, mask=real[:, None], other=0.0)
    sine = tl.load(table + rows * HEAD_DIM, mask=real[:, None], other=0.0)
    return x * cosine + y * sine * SIGN


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
            *(out, top, total, q, keys, values, key_stride, value_stride, first, stop),
            *(low, high, multiplier, cap_scale, columns, False, HAS_CAP, BLOCK_N, PRECISION),
        )
    before = tl.cdiv(start - tile_low, BLOCK_N)
    for index in tl.range(0, before + tl.cdiv(tile_high - stop, BLOCK_N)):
        first, limit = edge_block(index, before, tile_low, start, stop, tile_high, BLOCK_N)
        out, top, total = _accumulate(
            *(out, top, total, q, keys, values, key_stride, value_stride, first, limit),
            *(low, high, multiplier, cap_scale, columns, True, HAS_CAP, BLOCK_N, PRECISION),
        )
    return out, top, total


@triton.jit
def forward_kernel(
    q_rows,
    text_keys,  # rotated
    text_values,
    visual_keys,
    visual_values,
    tables,  # see `rotated_tile`
    tiles,  # `visible_ranges.query_tiles`: visual, then text
    bounds,  # int32 [4, rows]: visual low, visual high, text low, text high
    out_rows,  # [SPLITS, padded rows, HEADS, HEAD_DIM]
    lse_rows,  # float32 [SPLITS, padded rows, HEADS], natural logarithm
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
    multiplier,  # from raw logits to base 2
    cap_scale,
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
    """Output and log-sum-exp of one query tile, one group and one part of the visual keys."""
    group, split = tl.program_id(1), tl.program_id(2)
    tile = tiles + tl.program_id(0) * 10
    first_row, stop_row = tl.load(tile), tl.load(tile + 1)
    line, columns = tl.arange(0, BLOCK_M), tl.arange(0, HEAD_DIM)
    row, head = first_row + line // RATIO, group * RATIO + line % RATIO
    # A tile has at most BLOCK_M // RATIO rows; lines beyond its last row are idle.
    real = row < stop_row
    q_line = q_rows + row.to(tl.int64) * q_row_stride + head * q_head_stride
    q = tl.load(q_line[:, None] + columns[None, :], mask=real[:, None], other=0.0)

    out = tl.zeros([BLOCK_M, HEAD_DIM], dtype=tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
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
        out, top, total = _over_keys(
            *(out, top, total, q),
            visual_keys + group * visual_key_group,
            visual_values + group * visual_value_group,
            *(visual_key_stride, visual_value_stride),
            *(tile_low, tl.load(tile + 3), tl.load(tile + 4), tile_high),
            *(low, high, multiplier, cap_scale, columns, HAS_CAP, BLOCK_N, PRECISION),
        )
    if HAS_TEXT and (SPLITS == 1 or split == SPLITS - 1):
        if DEBIASED:
            # Not before: the tile must not take shared memory twice in the visual loop.
            q = rotated_tile(*(q_line, row, real, columns, tables, padded_rows, HEAD_DIM, 1.0)).to(
                q.dtype
            )
        low = tl.load(bounds + 2 * rows + row, mask=real, other=0)
        high = tl.load(bounds + 3 * rows + row, mask=real, other=0)
        out, top, total = _over_keys(
            *(out, top, total, q),
            text_keys + group * text_key_group,
            text_values + group * text_value_group,
            *(text_key_stride, text_value_stride),
            *(tl.load(tile + 6), tl.load(tile + 7), tl.load(tile + 8), tl.load(tile + 9)),
            *(low, high, multiplier, cap_scale, columns, HAS_CAP, BLOCK_N, PRECISION),
        )
    sees = total > 0
    total = tl.where(sees, total, 1.0)
    out = out / total[:, None]
    lse = tl.where(sees, (top + tl.log2(total)) / LOG2_E, float("-inf"))
    at = (split * padded_rows + row).to(tl.int64) * HEADS + head
    tl.store(lse_rows + at, lse, mask=real)
    tl.store(
        out_rows + at[:, None] * HEAD_DIM + columns[None, :],
        out.to(out_rows.dtype.element_ty),
        mask=real[:, None],
    )


@triton.jit
def combine_kernel(
    out_parts,  # float32 [SPLITS, part_lines, HEAD_DIM]
    lse_parts,  # float32 [SPLITS, part_lines]
    out_lines,
    lse_lines,
    part_lines,  # lines of a part, padding included
    lines,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Merges the parts of a split visual loop by their log-sum-exps, in a fixed order."""
    line, columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, HEAD_DIM)
    real = line < lines
    top = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    for split in tl.range(0, SPLITS):
        at = split * part_lines + line.to(tl.int64)
        top = tl.maximum(top, tl.load(lse_parts + at, mask=real, other=float("-inf")))
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    out = tl.zeros([BLOCK, HEAD_DIM], dtype=tl.float32)
    for split in tl.range(0, SPLITS):
        at = split * part_lines + line.to(tl.int64)
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


@triton.jit
def rotate_kernel(
    rows_in,
    tables,  # see `rotated_tile`
    add,  # rows to add after the rotation, where ADD
    rows_out,
    rows,
    table_rows,
    heads,
    row_stride,
    head_stride,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    SIGN: tl.constexpr,  # 1 rotates, -1 rotates back
    ADD: tl.constexpr,
):
    """Rotates rows [rows, heads, HEAD_DIM] by their angles; contiguous result and addend."""
    line, columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, HEAD_DIM)
    row, head = line // heads, line % heads
    real = row < rows
    source = rows_in + row.to(tl.int64) * row_stride + head * head_stride
    result = rotated_tile(source, row, real, columns, tables, table_rows, HEAD_DIM, SIGN)
    at = line.to(tl.int64)[:, None] * HEAD_DIM + columns[None, :]
    if ADD:
        result += tl.load(add + at, mask=real[:, None], other=0.0)
    tl.store(rows_out + at, result.to(rows_out.dtype.element_ty), mask=real[:, None])
