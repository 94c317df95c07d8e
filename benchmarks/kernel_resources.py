"""What the compiler makes of the joint kernel for a Hopper GPU, and what that allows; needs none.

    python -m benchmarks.kernel_resources                # the blocks that are tried first
    python -m benchmarks.kernel_resources --all --head-dims 256 --dtypes bf16
    python -m benchmarks.kernel_resources --write-docs after   # and docs/performance.md's tables

Shared memory and registers decide how many warps share a processor; spills are what does not fit
into registers; tensor-core work above what is needed is work done twice. Instructions are counted
in the loop over whole tiles, in machine code. No time is measured: throughput is computed from
counts and from an H100's published peaks (`occupancy`).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator

import torch
import triton

from dattn_mcore.parallel import entry

entry.prepare_imports("gpu")  # Megatron-Core's import dies of a broken package

from benchmarks.kernel_limits import limits_table
from benchmarks.kernel_variants import (
    DTYPES,
    HELPERS,
    KERNELS,
    Compiled,
    compile_helper,
    compile_main,
    needed_flops,
)
from benchmarks.machine_code import PRODUCTS
from benchmarks.occupancy import WARPS, resident_programs
from benchmarks.results import ROOT, markdown_table, provenance, write_section
from dattn_mcore.layers.attention.triton_tuning import Blocks, candidates

HEADER = (
    "head",
    "dtype",
    "kernel",
    "queries x keys, warps, stages",
    "registers",
    "stack, bytes",
    "spill stores, loads, bytes",
    "shared, KiB",
    f"warps of {WARPS}",
    "tensor-core instructions",
    "products issued / needed",
    "global loads, stores",
    "shared loads, stores",
    "spills in the loop",
)
SECTION = "kernel-resources"


def row_of(kernel: str, made: Compiled, blocks: Blocks, head_dim: int) -> list[object]:
    """Of the table, without head size and dtype."""
    code = made.code
    resident = resident_programs(made.registers, blocks.warps, made.shared)
    issued = code.wgmma_flops * blocks.warps // 4
    wide = kernel in KERNELS
    size = f"{blocks.queries} x {blocks.keys}, " if wide else "16 lines, "
    return [
        kernel,
        f"{size}{blocks.warps}, {blocks.stages}",
        made.registers,
        made.stack,
        f"{made.spill_stores}, {made.spill_loads}",
        f"{made.shared / 1024:.1f}",
        resident * blocks.warps,
        code.sum_of(*PRODUCTS),
        f"{issued / needed_flops(kernel, blocks, head_dim):.2f}" if issued else "",
        f"{code.sum_of('LDG', 'LDGSTS')}, {code.sum_of('STG')}",
        f"{code.sum_of('LDS', 'LDSM')}, {code.sum_of('STS', 'STSM')}",
        code.sum_of("LDL", "STL"),
    ]


def rows(args: argparse.Namespace) -> Iterator[list[object]]:
    """Of the table."""
    gpu = torch.device("meta")  # any but a CPU
    for head_dim in args.head_dims:
        for dtype in args.dtypes:
            for kernel in KERNELS:
                choices = candidates(kernel, head_dim, DTYPES[dtype], gpu)
                for blocks in choices if args.all else choices[:1]:
                    made = compile_main(kernel, head_dim, dtype, blocks, softcap=args.softcap)
                    yield [head_dim, dtype, *row_of(kernel, made, blocks, head_dim)]
            for helper in HELPERS:
                made, blocks = compile_helper(helper, head_dim, dtype)
                yield [head_dim, dtype, *row_of(helper, made, blocks, head_dim)]


def main(arguments: list[str] | None = None) -> int:
    """Prints the tables; see the file's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--softcap", action="store_true", help="with capped logits")
    parser.add_argument("--all", action="store_true", help="all candidates, not only the first")
    parser.add_argument(
        "--write-docs",
        choices=("before", "after"),
        help="write docs/performance.md's table of this commit as that of before or after tuning",
    )
    args = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: kernels would be interpreted, not compiled")
    table = markdown_table(HEADER, rows(args))
    said = " ".join(["python -m benchmarks.kernel_resources", *(arguments or sys.argv[1:])])
    origin = f"Computed, not measured. Triton {triton.__version__}; {provenance('cpu')}; `{said}`\n"
    text = f"{table}\n{limits_table()}\n{origin}"
    sys.stdout.write(text)
    if args.write_docs:
        write_section(ROOT / "docs/performance.md", f"{SECTION}-{args.write_docs}", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
