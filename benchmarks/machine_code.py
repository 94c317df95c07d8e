"""What NVIDIA's tools say of a compiled kernel: registers and spills, and instructions of a loop.

Both come with Triton: `cuobjdump` says what a thread uses, `nvdisasm` gives the machine code.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field

import triton

_USED = re.compile(r"REG:(\d+) STACK:(\d+)")
_LOCAL = re.compile(r"\b(STL|LDL)(?:\.LU)?(?:\.(64|128))?\b")
_LABEL = re.compile(r"^\s*(\.L_\w+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_TARGET = re.compile(r"\((\.L_\w+)\)")
_WGMMA = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)\.")
PRODUCTS = ("HGMMA", "HMMA")
_FEWEST_FMAS = 64  # of a loop that multiplies matrices without tensor cores


@dataclass(frozen=True)
class Usage:
    """Of a thread: registers, and bytes of its stack frame and of spills."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int


@dataclass(frozen=True)
class Code:
    """Instructions of a part of a kernel.

    Attributes:
        counts: by name without modifiers, of one warp.
        wgmma_flops: of the tensor-core instructions of one group of four warps.
    """

    counts: Counter[str] = field(default_factory=Counter)
    wgmma_flops: int = 0

    def sum_of(self, *names: str) -> int:
        """Instructions of these names."""
        return sum(self.counts[name] for name in names)


def parse_usage(resources: str, text: str) -> Usage:
    """Usage from what `cuobjdump -res-usage` writes of one kernel, and from its machine code.

    A Triton kernel has no variables in local memory: what is stored there and loaded is spills.

    Raises:
        ValueError: the first text names no registers or no stack.
    """
    used = _USED.search(resources)
    if not used:
        raise ValueError(f"cuobjdump names no registers or no stack: {resources[-500:]!r}")
    moved = {"STL": 0, "LDL": 0}
    for name, bits in _LOCAL.findall(text):
        moved[name] += int(bits or 32) // 8
    return Usage(int(used[1]), int(used[2]), moved["STL"], moved["LDL"])


def usage_of(cubin: bytes, text: str) -> Usage:
    """Of a kernel as Triton compiled it, and its `disassembly`."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(cubin)
        file.flush()
        tool = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        done = subprocess.run(tool, capture_output=True, text=True, check=True)
    return parse_usage(done.stdout, text)


def disassembly(cubin: bytes) -> str:
    """Machine code as text."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(cubin)
        file.flush()
        tool = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(tool, capture_output=True, text=True, check=True).stdout


def tile_code(text: str) -> Code:
    """The loop that takes a tile after the other without masks; all of it where none multiplies.

    It is the shortest loop that multiplies and has no other loop inside; masks make loops longer.

    Args:
        text: of `disassembly`.
    """
    places: dict[str, int] = {}
    found: list[tuple[str, str]] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            places[label[1]] = len(found)
        elif instruction := _INSTRUCTION.search(line):
            found.append((instruction[1], instruction[2]))
    loops = []
    for index, (name, operands) in enumerate(found):
        target = _TARGET.search(operands) if name.startswith("BRA") else None
        if target and places.get(target[1], index + 1) <= index:
            loops.append((places[target[1]], index + 1))
    multiplying = [loop for loop in loops if _multiplies(_code(found[slice(loop[0], loop[1])]))]
    if not multiplying:
        return _code(found)
    low, high = min(multiplying, key=lambda loop: loop[1] - loop[0])
    return _code(found[low:high])


def _multiplies(code: Code) -> bool:
    return code.sum_of(*PRODUCTS) > 0 or code.counts["FFMA"] >= _FEWEST_FMAS


def _code(instructions: list[tuple[str, str]]) -> Code:
    counts = Counter(name.partition(".")[0] for name, _ in instructions)
    shapes = (_WGMMA.match(name) for name, _ in instructions)
    flops = sum(2 * int(m[1]) * int(m[2]) * int(m[3]) for m in shapes if m)
    return Code(counts, flops)
