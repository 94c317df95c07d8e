"""Variants of the joint kernel's Triton functions, compiled for a Hopper GPU on any machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton

from benchmarks.machine_code import Code, disassembly, tile_code, usage_of
from dattn_mcore.layers.attention.triton_forward import combine_kernel, forward_kernel
from dattn_mcore.layers.attention.triton_key_gradient import key_kernel
from dattn_mcore.layers.attention.triton_query_gradient import query_kernel
from dattn_mcore.layers.attention.triton_tiles import rotate_kernel
from dattn_mcore.layers.attention.triton_tuning import Blocks
from dattn_mcore.parallel import platform

KERNELS = {"forward": forward_kernel, "query": query_kernel, "key": key_kernel}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HELPERS = ("rotate", "rotate back", "combine")
PRODUCTS_OF_A_TILE = {"forward": 2, "query": 3, "key": 4}
SMALL = Blocks(16, 16)
_INTEGERS = ("tiles", "intervals", "bounds")
_FLOATS = ("tables", "lse_rows", "delta_rows", "d_visual", "d_text", "lse_lines", "lse_parts")
_TENSORS = (
    "q_rows",
    "q_rotated",
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
        registers: of a thread.
        stack, spill_stores, spill_loads: bytes of a thread.
        code: of the loop over whole tiles.
        assembly: PTX.
        integers: arguments that are numbers of something.
        specialised: arguments of which Triton compiles one version for values (addresses) that are
            multiples of 16 and one for others.
    """

    shared: int
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    code: Code
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
    text = disassembly(result.asm["cubin"])
    usage = usage_of(result.asm["cubin"], text)
    specialised = tuple(kernel.params[index].name for (index,) in divisible)
    integers = tuple(name for name, kind in signature.items() if kind == "i32")
    return Compiled(
        shared=result.metadata.shared,
        registers=usage.registers,
        stack=usage.stack,
        spill_stores=usage.spill_stores,
        spill_loads=usage.spill_loads,
        code=tile_code(text),
        assembly=result.asm["ptx"],
        integers=integers,
        specialised=specialised,
    )


def compile_main(
    kernel: str,
    head_dim: int,
    dtype: str,
    blocks: Blocks,
    *,
    softcap: bool,
    split: bool = False,
    several: bool = False,
    heads: int = 32,
    ratio: int = 4,
) -> Compiled:
    """One of KERNELS, with `ratio` query heads a group."""
    constants = dict(
        HEADS=heads,
        RATIO=ratio,
        HEAD_DIM=head_dim,
        BLOCK_M=blocks.queries,
        BLOCK_N=blocks.keys,
        SPLIT=split,
        HAS_CAP=softcap,
        PRECISION="ieee",
    )
    if kernel != "key":
        constants |= dict(HAS_VISUAL=True, HAS_TEXT=True, SEVERAL=several)
    return compile_kernel(KERNELS[kernel], dtype, constants, blocks)


def compile_helper(helper: str, head_dim: int, dtype: str) -> tuple[Compiled, Blocks]:
    """One of HELPERS: rotation, there and back, or the merge of parts."""
    constants = dict(HEAD_DIM=head_dim, BLOCK=16)
    kernel, kind = combine_kernel, dtype
    if helper != "combine":
        back = helper == "rotate back"
        kernel, kind = rotate_kernel, "fp32" if back else dtype
        constants |= dict(SIGN=-1.0 if back else 1.0, ADD=back)
    return compile_kernel(kernel, kind, constants, SMALL), SMALL


def needed_flops(kernel: str, blocks: Blocks, head_dim: int) -> int:
    """Of a tile's matrix products; 0 for a helper."""
    return 2 * PRODUCTS_OF_A_TILE.get(kernel, 0) * blocks.queries * blocks.keys * head_dim
