"""Launches the Triton kernels over a pack: from tensors to grids, tiles and buffers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton

from dattn_mcore.layers.attention import triton_backward, triton_forward
from dattn_mcore.layers.attention.triton_plan import Keys, Plan, Setting
from dattn_mcore.layers.attention.triton_tuning import Blocks, candidates, fitted, splits
from dattn_mcore.layers.attention.visible_ranges import Ranges

_fits: dict[tuple, int] = {}  # the first candidate that a device had the shared memory for


def rotation_tables(angles: torch.Tensor) -> torch.Tensor:
    """float32 [2, rows, head_dim] from angles [rows, 1, 1, head_dim]; see `rotated_tile`."""
    angles = angles.to(torch.float32).flatten(1)
    sine = angles.sin()
    sine[:, : sine.shape[1] // 2].neg_()
    return torch.stack([angles.cos(), sine])


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
        triton_forward.rotate_kernel[(triton.cdiv(lines, block),)](
            *(rows, tables, result if add is None else add, result),
            *(rows.shape[0], tables.shape[1], rows.shape[1], rows.stride(0), rows.stride(1)),
            HEAD_DIM=rows.shape[2],
            BLOCK=block,
            SIGN=sign,
            ADD=add is not None,
        )
    return result


def forward(
    q: torch.Tensor, keys: Keys, tables: torch.Tensor, plan: Plan, setting: Setting
) -> tuple[torch.Tensor, torch.Tensor]:
    """Joint attention of the rows of a plan.

    Returns:
        Output like q, zero on padding rows; log-sum-exp float32 [rows, heads], minus infinity
        for rows that see nothing.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    out[plan.rows :] = 0
    lse[plan.rows :] = -torch.inf
    if not plan.rows:
        return out, lse

    def launch(blocks: Blocks) -> None:
        blocks, tiles, parts = _query_grid(q, keys, plan, setting, blocks)
        out_parts, lse_parts = out, lse
        if parts > 1:
            out_parts = q.new_empty((parts, *q.shape), dtype=torch.float32)
            lse_parts = lse.new_empty((parts, *lse.shape))
        triton_forward.forward_kernel[(len(tiles), keys.text.shape[1], parts)](
            q_rows=q,
            out_rows=out_parts,
            lse_rows=lse_parts,
            tiles=tiles,
            SPLITS=parts,
            **keys.pointers(),
            **_common(q, keys, tables, plan, setting, blocks),
        )
        if parts > 1:
            lines, block = lse.numel(), 16
            triton_forward.combine_kernel[(triton.cdiv(plan.rows * q.shape[1], block),)](
                *(out_parts, lse_parts, out, lse, lines, plan.rows * q.shape[1]),
                HEAD_DIM=q.shape[2],
                BLOCK=block,
                SPLITS=parts,
            )

    _first_that_fits("forward", setting.tuning.forward, q, launch)
    return out, lse


def backward(
    d_out: torch.Tensor,
    q: torch.Tensor,
    keys: Keys,
    tables: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: Plan,
    setting: Setting,
) -> tuple[torch.Tensor, ...]:
    """Gradients of q, text keys and values, visual keys and values; None for an absent set."""
    d_out = d_out.contiguous()
    delta = torch.empty_like(lse)
    d_q = _query_gradient(d_out, delta, q, keys, tables, out, lse, plan, setting)
    d_text = d_text_values = d_visual = d_visual_values = None
    q_rotated = rotated(q, tables) if setting.has_text or not setting.debiased else q
    shared = (d_out, lse, delta, plan, setting)
    if setting.has_text:
        d_rotated, d_text_values = _key_gradients(
            "text", q_rotated, keys.text, keys.text_values, *shared
        )
        d_text = rotated(d_rotated, tables, -1.0)
    if setting.has_visual:
        asking = q if setting.debiased else q_rotated
        d_visual, d_visual_values = _key_gradients(
            "visual", asking, keys.visual, keys.visual_values, *shared
        )
    return d_q, d_text, d_text_values, d_visual, d_visual_values  # type: ignore[return-value]


def _query_gradient(
    d_out: torch.Tensor,
    delta: torch.Tensor,
    q: torch.Tensor,
    keys: Keys,
    tables: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: Plan,
    setting: Setting,
) -> torch.Tensor:
    """Gradient of q; fills delta."""
    through_text = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    through_visual = through_text

    def launch(blocks: Blocks) -> None:
        nonlocal through_visual
        blocks, tiles, parts = _query_grid(q, keys, plan, setting, blocks)
        if setting.has_visual:
            through_visual = through_text.new_empty((parts, *q.shape))
        triton_backward.query_kernel[(len(tiles), keys.text.shape[1], parts)](
            q_rows=q,
            out_rows=out,
            lse_rows=lse,
            d_out_rows=d_out,
            delta_rows=delta,
            d_visual=through_visual,
            d_text=through_text,
            tiles=tiles,
            scale=setting.scale,
            SPLITS=parts,
            **keys.pointers(),
            **_common(q, keys, tables, plan, setting, blocks),
        )

    if plan.rows:
        _first_that_fits("query", setting.tuning.query, q, launch)
    real = slice(0, plan.rows)
    d_q = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    if not plan.rows:
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
    kind: str,
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    d_out: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    plan: Plan,
    setting: Setting,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of one set of keys and values; keys in the frame in which they were given."""
    count, groups, _ = keys.shape
    heads = q.shape[1]
    ratio = heads // groups
    ranges: Ranges = getattr(plan, kind)
    bounds = plan.bounds()[0 if kind == "visual" else 2 :]
    results: list[torch.Tensor] = []

    def launch(blocks: Blocks) -> None:
        blocks = fitted(blocks, max(plan.lengths, default=1) * ratio, ratio)
        tiles = plan.key_tiles(kind, blocks.keys)
        most = triton.cdiv(max(plan.lengths) * ratio, blocks.queries)
        parts = setting.tuning.key_splits or splits(len(tiles) * groups, most, q.device)
        dtype = keys.dtype if parts == 1 else torch.float32
        shape = (parts, *keys.shape)
        grads = [torch.empty(shape, dtype=dtype, device=q.device) for _ in range(2)]
        triton_backward.key_kernel[(len(tiles), groups, parts)](
            *(q, keys, values, tiles, bounds[0], bounds[1], lse, delta, d_out, *grads, count),
            *(q.stride(0), q.stride(1)),
            *(keys.stride(0), keys.stride(1), values.stride(0), values.stride(1)),
            scale=setting.scale,
            HEADS=heads,
            RATIO=ratio,
            HEAD_DIM=q.shape[2],
            BLOCK_M=blocks.queries,
            BLOCK_N=blocks.keys,
            SPLITS=parts,
            PRECISION=_precision(q),
            num_warps=blocks.warps,
            num_stages=blocks.stages,
            **setting.logits(),
        )
        results[:] = [g[0] if parts == 1 else g.sum(0).to(keys.dtype) for g in grads]

    real = sum(ranges.key_lengths)
    if real and plan.rows:
        _first_that_fits("key", setting.tuning.key, q, launch)
        for grad in results:
            grad[real:] = 0
        return results[0], results[1]
    zeros = torch.zeros(keys.shape, dtype=keys.dtype, device=keys.device)
    return zeros, torch.zeros_like(zeros)


def _query_grid(
    q: torch.Tensor, keys: Keys, plan: Plan, setting: Setting, blocks: Blocks
) -> tuple[Blocks, torch.Tensor, int]:
    """Blocks as fitted to the pack, query tiles, and parts of the visual loop."""
    groups = keys.text.shape[1]
    ratio = q.shape[1] // groups
    blocks = fitted(blocks, max(plan.lengths) * ratio, ratio)
    tiles = plan.query_tiles(blocks.queries // ratio)
    parts = 1
    if setting.has_visual:
        most = triton.cdiv(max(plan.visual.key_lengths), blocks.keys)
        programs = len(tiles) * groups
        parts = setting.tuning.visual_splits or splits(programs, most, q.device)
    return blocks, tiles, parts


def _common(
    q: torch.Tensor,
    keys: Keys,
    tables: torch.Tensor,
    plan: Plan,
    setting: Setting,
    blocks: Blocks,
) -> dict[str, object]:
    """Arguments that the kernels over queries share."""
    return {
        "tables": tables,
        "bounds": plan.bounds(),
        "rows": plan.rows,
        "padded_rows": q.shape[0],
        "q_row_stride": q.stride(0),
        "q_head_stride": q.stride(1),
        "HEADS": q.shape[1],
        "RATIO": q.shape[1] // keys.text.shape[1],
        "HEAD_DIM": q.shape[2],
        "BLOCK_M": blocks.queries,
        "BLOCK_N": blocks.keys,
        "HAS_VISUAL": setting.has_visual,
        "HAS_TEXT": setting.has_text,
        "DEBIASED": setting.debiased,
        "PRECISION": _precision(q),
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
        **setting.logits(),
    }


def _precision(q: torch.Tensor) -> str:
    """How products are computed: fp32 as such, never in TF32; see `triton_forward.matmul`."""
    return "ieee" if q.dtype is torch.float32 or q.device.type != "cpu" else "widened"


def _first_that_fits(
    kernel: str, fixed: Blocks | None, q: torch.Tensor, launch: Callable[[Blocks], None]
) -> None:
    """Launches with the first blocks that the device has shared memory and registers for."""
    choices = (fixed,) if fixed else candidates(kernel, q.shape[2], q.dtype, q.device)
    key = (kernel, q.shape[2], q.dtype, q.device)
    for index in range(0 if fixed else _fits.get(key, 0), len(choices)):
        try:
            launch(choices[index])
        except triton.runtime.errors.OutOfResources:
            if index == len(choices) - 1:
                raise
            continue
        if not fixed:
            _fits[key] = index
        return
