"""What the compiler says of the joint kernel on a Hopper GPU; needs none.

    python -m benchmarks.kernel_resources                # every candidate of the table of blocks
    python -m benchmarks.kernel_resources --head-dims 256 --dtypes bf16 --first

Shared memory and registers decide how many programs share a processor (228 KiB, 64 Ki registers);
stack is what does not fit into registers. No time is measured.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton

from dattn_mcore.parallel import entry

entry.prepare_imports("gpu")  # Megatron-Core's import dies of a broken package

from benchmarks.results import markdown_table
from dattn_mcore.layers.attention.triton_forward import combine_kernel, forward_kernel
from dattn_mcore.layers.attention.triton_key_gradient import key_kernel
from dattn_mcore.layers.attention.triton_query_gradient import query_kernel
from dattn_mcore.layers.attention.triton_tiles import rotate_kernel
from dattn_mcore.layers.attention.triton_tuning import Blocks, candidates
from dattn_mcore.parallel import platform

KERNELS = {"forward": forward_kernel, "query": query_kernel, "key": key_kernel}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SMALL = Blocks(16, 16)
_INTEGERS = ("tiles", "intervals", "bounds")
_FLOATS = ("tables", "lse_rows", "delta_rows", "d_visual", "d_text", "lse_lines", "lse_parts")
_TENSORS = (
    "q_rows",
    "text_keys",
    "text_values",
    "visual_keys",
    "visual_values",
    "keys",
    "values",
    "out_rows",
    "d_out_rows",
    "d_keys",
    "d_values",
    "out_lines",
    "rows_in",
    "rows_out",
)


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled.

    Attributes:
        shared: bytes of shared memory of a program.
        registers, stack: number and bytes of a thread.
        assembly: PTX.
        integers: arguments that are numbers of something.
        specialised: arguments of which Triton compiles one version for values (addresses) that are
            multiples of 16 and one for others.
    """

    shared: int
    registers: int
    stack: int
    assembly: str
    integers: tuple[str, ...]
    specialised: tuple[str, ...]


def compile_kernel(kernel: Any, dtype: str, constants: dict[str, Any], blocks: Blocks) -> Compiled:
    """Compiles as a launch would: tensors and the model's strides are divisible by 16.

    Args:
        kernel: a Triton function.
        dtype: of queries, keys and values: bf16, fp16 or fp32.
        constants: its constant arguments.
        blocks: gives warps and stages.
    """
    signature, divisible = {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
            continue
        kind = "*fp32" if name in (*_FLOATS, "out_parts", "add") else "i32"
        kind = f"*{dtype}" if name in _TENSORS else "*i32" if name in _INTEGERS else kind
        signature[name] = "fp32" if name in ("multiplier", "cap_scale", "scale") else kind
        fixed = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
        if signature[name] != "fp32" and not fixed:
            divisible[(index,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(kernel, signature, constexprs=constants, attrs=divisible)
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    result = triton.compile(source, target=platform.hopper_target(), options=options)
    with tempfile.NamedTemporaryFile() as file:
        file.write(result.asm["cubin"])
        file.flush()
        tool = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    specialised = tuple(kernel.params[index].name for (index,) in divisible)
    integers = tuple(name for name, kind in signature.items() if kind == "i32")
    used = result.metadata.shared, int(found[1]), int(found[2])
    return Compiled(*used, result.asm["ptx"], integers, specialised)


def compile_main(
    kernel: str,
    head_dim: int,
    dtype: str,
    blocks: Blocks,
    *,
    softcap: bool,
    split: bool = False,
    several: bool = False,
) -> Compiled:
    """One of KERNELS, with four query heads a group."""
    constants = dict(
        HEADS=32,
        RATIO=4,
        HEAD_DIM=head_dim,
        BLOCK_M=blocks.queries,
        BLOCK_N=blocks.keys,
        SPLIT=split,
        SEVERAL=several,
        HAS_CAP=softcap,
        PRECISION="ieee",
    )
    if kernel != "key":
        constants |= dict(HAS_VISUAL=True, HAS_TEXT=True, DEBIASED=True)
    return compile_kernel(KERNELS[kernel], dtype, constants, blocks)


def compile_helpers(head_dim: int, dtype: str) -> list[Compiled]:
    """The kernels beside them: rotation, there and back, and the merge of parts."""
    rotation = dict(HEAD_DIM=head_dim, BLOCK=16, SIGN=1.0, ADD=False)
    back = rotation | dict(SIGN=-1.0, ADD=True)
    merge = dict(HEAD_DIM=head_dim, BLOCK=16)
    return [
        compile_kernel(rotate_kernel, dtype, rotation, SMALL),
        compile_kernel(rotate_kernel, "fp32", back, SMALL),
        compile_kernel(combine_kernel, dtype, merge, SMALL),
    ]


def rows(args: argparse.Namespace) -> Iterator[tuple[object, ...]]:
    """Of the table."""
    gpu = torch.device("meta")  # any but a CPU
    for head_dim in args.head_dims:
        for dtype in args.dtypes:
            for kernel in KERNELS:
                choices = candidates(kernel, head_dim, DTYPES[dtype], gpu)
                for blocks in choices[:1] if args.first else choices:
                    made = compile_main(kernel, head_dim, dtype, blocks, softcap=args.softcap)
                    size = f"{blocks.queries} x {blocks.keys}, {blocks.warps}, {blocks.stages}"
                    used = made.shared / 1024, made.registers, made.stack
                    yield head_dim, dtype, kernel, size, *used


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; see the file's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=["bf16", "fp32"])
    parser.add_argument("--softcap", action="store_true", help="with capped logits")
    parser.add_argument("--first", action="store_true", help="only the candidate tried first")
    args = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: kernels would be interpreted, not compiled")
    header = ("head", "dtype", "kernel", "queries x keys, warps, stages", "shared, KiB")
    sys.stdout.write(markdown_table((*header, "registers", "stack, bytes"), rows(args)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
