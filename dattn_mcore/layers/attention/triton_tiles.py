"""What the Triton kernels share: logits, products, blocks of a loop, and tiles of queries.

A program over queries owns a tile in which the query heads of a group are packed: line `i` is query
head `i % RATIO` of text row `i // RATIO` of the tile. So all lines share their keys. A loop is a
range of keys (or of query lines); blocks that are seen whole are taken without a mask, the edges
with one. Logits are kept to base 2.

Numbers of rows are no constants and are not specialised: a pack of another length compiles nothing.
Strides are the model's, and their divisibility by 16 lets loads be wide.
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
def part_of(low, high, turn, STEP: tl.constexpr, SPLIT: tl.constexpr):
    """[low, high), or this program's share of it where the third axis of the grid splits a loop.

    `turn` counts the ranges of a program: short ones go to another part each.
    """
    if SPLIT:
        part = (tl.program_id(2) + turn) % tl.num_programs(2)
        share = tl.cdiv(tl.cdiv(high - low, STEP), tl.num_programs(2)) * STEP
        low = tl.minimum(low + part * share, high)
        high = tl.minimum(low + share, high)
    return low, high


@triton.jit
def query_tile(tiles, slots, RATIO: tl.constexpr, BLOCK_M: tl.constexpr):
    """This program's tile: its entry, and row, head and being real of each line.

    Called again where a long loop lies between two uses: what the addresses are made of would stay
    in registers meanwhile, of which large heads have too few. So the loads are volatile.

    tiles: see `visible_ranges.query_tiles`.
    """
    tile = tiles + tl.program_id(0) * (6 + 4 * slots)
    line = tl.arange(0, BLOCK_M)
    first, last = tl.load(tile, volatile=True), tl.load(tile + 1, volatile=True)
    row, head = first + line // RATIO, tl.program_id(1) * RATIO + line % RATIO
    # A tile has at most BLOCK_M // RATIO rows; lines beyond its last row are idle.
    return tile, row, head, row < last


@triton.jit
def row_ranges(bounds, rows, row, real):
    """First key and limit of each line; bounds: int32 [2, rows]."""
    low = tl.load(bounds + row, mask=real, other=0)
    return low, tl.load(bounds + rows + row, mask=real, other=0)


@triton.jit
def query_lines(rows, row, head, real, row_stride, head_stride, HEAD_DIM: tl.constexpr):
    """The tile's lines of [rows, heads, HEAD_DIM]; zeros where a line is not real.

    Loaded and not computed, so that the compiler keeps them in shared memory and not in registers.
    """
    lines = rows + row.to(tl.int64) * row_stride + head * head_stride
    columns = tl.arange(0, HEAD_DIM)
    return tl.load(lines[:, None] + columns[None, :], mask=real[:, None], other=0.0)


@triton.jit(do_not_specialize=["rows", "table_rows"])
def rotate_kernel(
    rows_in,
    tables,  # float32 [2, table_rows, HEAD_DIM / 2], see `triton_launch.rotation_tables`
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
    """Rotates rows [rows, heads, HEAD_DIM] by their angles; contiguous result and addend.

    In float32, GPT-NeoX style: a column needs only its partner in the other half, and both have the
    same angle.
    """
    line, columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, HEAD_DIM // 2)
    row, head = line // heads, line % heads
    real = (row < rows)[:, None]
    source = (rows_in + row.to(tl.int64) * row_stride + head * head_stride)[:, None] + columns[
        None, :
    ]
    x = tl.load(source, mask=real, other=0.0).to(tl.float32)
    y = tl.load(source + HEAD_DIM // 2, mask=real, other=0.0).to(tl.float32)
    table = tables + row[:, None] * (HEAD_DIM // 2) + columns[None, :]
    cosine = tl.load(table, mask=real, other=0.0)
    sine = tl.load(table + table_rows * (HEAD_DIM // 2), mask=real, other=0.0) * SIGN
    first, second = x * cosine - y * sine, y * cosine + x * sine
    at = line.to(tl.int64)[:, None] * HEAD_DIM + columns[None, :]
    if ADD:
        first += tl.load(add + at, mask=real, other=0.0)
        second += tl.load(add + at + HEAD_DIM // 2, mask=real, other=0.0)
    tl.store(rows_out + at, first.to(rows_out.dtype.element_ty), mask=real)
    tl.store(rows_out + at + HEAD_DIM // 2, second.to(rows_out.dtype.element_ty), mask=real)
