"""Launches the Triton kernels of the forward pass: from tensors to grids, tiles and buffers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton

from dattn_mcore.layers.attention.triton_forward import combine_kernel, forward_kernel
from dattn_mcore.layers.attention.triton_schedule import Keys, Schedule, Setting
from dattn_mcore.layers.attention.triton_tiles import rotate_kernel
from dattn_mcore.layers.attention.triton_tuning import Blocks, candidates, fitted, splits


def rotation_tables(angles: torch.Tensor, factor: torch.Tensor | None = None) -> torch.Tensor:
    """float32 [2, rows, head_dim / 2] from angles [rows, 1, 1, head_dim]; see `rotated_halves`.

    Args:
        angles: see above; the two halves are alike.
        factor: multiplies what is rotated, [rows, 1, 1, 1]; None for 1.
    """
    angles = angles.flatten(1)[:, : angles.shape[-1] // 2].to(torch.float32)
    tables = torch.stack([angles.cos(), angles.sin()])
    return tables if factor is None else tables.mul_(factor.to(torch.float32).flatten(1))


def rotated(
    rows: torch.Tensor,
    tables: torch.Tensor,
    sign: float = 1.0,
    add: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Rotates rows [rows, heads, head_dim] by the tables of their rows, then adds `add`."""
    result = torch.empty(rows.shape, dtype=dtype or rows.dtype, device=rows.device)
    lines = rows.shape[0] * rows.shape[1]
    if lines:
        block = 16
        rotate_kernel[(triton.cdiv(lines, block),)](
            rows_in=rows,
            tables=tables,
            add=result if add is None else add,
            rows_out=result,
            rows=rows.shape[0],
            table_rows=tables.shape[1],
            heads=rows.shape[1],
            row_stride=rows.stride(0),
            head_stride=rows.stride(1),
            HEAD_DIM=rows.shape[2],
            BLOCK=block,
            SIGN=sign,
            ADD=add is not None,
        )
    return result


def asking(
    q: torch.Tensor, tables: torch.Tensor, setting: Setting
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries [rows, heads, head_dim] as they meet visual keys, and, contiguous, text keys."""
    turned = rotated(q, tables) if setting.has_text or not setting.debiased else q
    return q if setting.debiased else turned, turned


def forward(
    q: torch.Tensor, keys: Keys, tables: torch.Tensor, schedule: Schedule, setting: Setting
) -> tuple[torch.Tensor, torch.Tensor]:
    """Joint attention of the rows of a schedule.

    Returns:
        Output like q, zero on padding rows; log-sum-exp float32 [rows, heads], minus infinity
        for rows that see nothing.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    out[schedule.rows :] = 0
    lse[schedule.rows :] = -torch.inf
    if not schedule.rows:
        return out, lse
    q_visual, q_text = asking(q, tables, setting)

    def launch(blocks: Blocks) -> None:
        blocks, tiles, parts = query_grid(q, keys, schedule, setting, blocks)
        out_parts, lse_parts = out, lse
        if parts > 1:
            out_parts = q.new_empty((parts, *q.shape), dtype=torch.float32)
            lse_parts = lse.new_empty((parts, *lse.shape))
        forward_kernel[(len(tiles), keys.text.shape[1], parts)](
            q_rows=q_visual,
            q_rotated=q_text,
            out_rows=out_parts,
            lse_rows=lse_parts,
            tiles=tiles,
            SPLIT=parts > 1,
            **keys.pointers(),
            **query_arguments(q_visual, keys, schedule, setting, blocks),
        )
        if parts > 1:
            lines, block = lse.numel(), 16
            combine_kernel[(triton.cdiv(schedule.rows * q.shape[1], block),)](
                out_parts=out_parts,
                lse_parts=lse_parts,
                out_lines=out,
                lse_lines=lse,
                part_lines=lines,
                lines=schedule.rows * q.shape[1],
                parts=parts,
                HEAD_DIM=q.shape[2],
                BLOCK=block,
            )

    first_that_fits("forward", setting.tuning.forward, q, launch)
    return out, lse


def query_grid(
    q: torch.Tensor, keys: Keys, schedule: Schedule, setting: Setting, blocks: Blocks
) -> tuple[Blocks, torch.Tensor, int]:
    """Blocks as fitted to the pack, query tiles, and parts of the visual loop."""
    groups = keys.text.shape[1]
    ratio = q.shape[1] // groups
    blocks = fitted(blocks, max(schedule.lengths) * ratio, ratio)
    tiles = schedule.query_tiles(blocks.queries // ratio)
    parts = 1
    if setting.has_visual:
        most = triton.cdiv(schedule.visual.most, blocks.keys)
        programs = len(tiles) * groups
        parts = setting.tuning.visual_splits or splits(programs, most, q.device)
    return blocks, tiles, parts


def query_arguments(
    q: torch.Tensor, keys: Keys, schedule: Schedule, setting: Setting, blocks: Blocks
) -> dict[str, object]:
    """Arguments that the kernels over queries share; q as it meets visual keys."""
    return {
        "bounds": schedule.bounds(),
        "rows": schedule.rows,
        "padded_rows": q.shape[0],
        "slots": schedule.slots,
        "q_row_stride": q.stride(0),
        "q_head_stride": q.stride(1),
        "HEADS": q.shape[1],
        "RATIO": q.shape[1] // keys.text.shape[1],
        "HEAD_DIM": q.shape[2],
        "BLOCK_M": blocks.queries,
        "BLOCK_N": blocks.keys,
        "SEVERAL": schedule.slots > 1,
        "HAS_VISUAL": setting.has_visual,
        "HAS_TEXT": setting.has_text,
        "PRECISION": precision(q),
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
        **setting.logits(),
    }


def precision(q: torch.Tensor) -> str:
    """How products are computed: fp32 as such, never in TF32; see `triton_tiles.matmul`."""
    return "ieee" if q.dtype is torch.float32 or q.device.type != "cpu" else "widened"


def first_that_fits(
    kernel: str, fixed: Blocks | None, q: torch.Tensor, launch: Callable[[Blocks], None]
) -> None:
    """Launches with the first blocks that the device has shared memory and registers for.

    Every launch tries from the first: what was launched before must not decide, or a resumed run
    could differ in the last bit. Triton remembers which compiled kernels do not fit.
    """
    choices = (fixed,) if fixed else candidates(kernel, q.shape[2], q.dtype, q.device)
    for blocks in choices[:-1]:
        try:
            return launch(blocks)
        except triton.runtime.errors.OutOfResources:
            continue
    launch(choices[-1])
