"""What the joint kernel can reach on an H100 at the shipped layers' sizes, by its instructions."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.attention_backends import LAYERS, Layer
from benchmarks.kernel_variants import KERNELS, compile_main, needed_flops
from benchmarks.occupancy import (
    BANDWIDTH,
    PEAK,
    PROCESSORS,
    WARP,
    TileCost,
    rates,
    resident_programs,
)
from benchmarks.results import markdown_table
from dattn_mcore.layers.attention.triton_tuning import candidates, splits_for

TEXT, VISUAL = 512, (2880, 32768)
HEADER = (
    "layer",
    "V",
    "kernel",
    "programs",
    "warps of 64",
    "GFLOP",
    "MB",
    "roofline, TFLOP/s",
    "predicted, TFLOP/s",
)


def limits_table() -> str:
    """One row for a shipped layer, a number of visual rows, and a kernel; the visual loop, bf16."""
    return markdown_table(HEADER, _rows())


def _rows() -> Iterator[list[object]]:
    for name, layer in LAYERS["gpu"].items():
        for kernel in KERNELS:
            yield from _rows_of(name, layer, kernel)


def _rows_of(name: str, layer: Layer, kernel: str) -> Iterator[list[object]]:
    blocks = candidates(kernel, layer.head_dim, torch.bfloat16, torch.device("meta"))[0]
    ratio = layer.heads // layer.groups
    made = compile_main(
        kernel,
        layer.head_dim,
        "bf16",
        blocks,
        softcap=layer.softcap is not None,
        heads=layer.heads,
        ratio=ratio,
    )
    code, threads = made.code, blocks.warps * WARP
    instructions = sum(code.counts.values()) * blocks.warps
    cost = TileCost(
        needed=needed_flops(kernel, blocks, layer.head_dim),
        tensor=code.wgmma_flops * blocks.warps // 4,
        fma=2 * code.counts["FFMA"] * threads,
        special=code.counts["MUFU"] * threads,
        instructions=instructions,
    )
    resident = resident_programs(made.registers, blocks.warps, made.shared) * blocks.warps
    for visual in VISUAL:
        lines = TEXT * ratio
        over, loop = (visual, lines) if kernel == "key" else (lines, visual)
        own, step = blocks.queries, blocks.keys
        if kernel == "key":
            own, step = step, own
        programs = -(-over // own) * layer.groups
        programs *= splits_for(programs, -(-loop // step), PROCESSORS)
        flops = needed_flops(kernel, blocks, layer.head_dim) / blocks.queries / blocks.keys
        flops *= lines * visual * layer.groups
        # Queries and output, keys and values once: d_out and gradients too, in the backward pass.
        sides = {"forward": (2, 2), "query": (4, 2), "key": (2, 4)}[kernel]
        moved = 2 * layer.head_dim * layer.groups * (sides[0] * lines + sides[1] * visual)
        roofline = min(PEAK, flops / moved * BANDWIDTH)
        best, worst = (min(rate, roofline) for rate in rates(cost, programs))
        yield [
            name,
            visual,
            kernel,
            programs,
            resident,
            f"{flops / 1e9:.1f}",
            f"{moved / 1e6:.1f}",
            f"{roofline / 1e12:.0f}",
            f"{worst / 1e12:.0f} to {best / 1e12:.0f}",
        ]
