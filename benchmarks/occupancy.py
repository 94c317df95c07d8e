"""How many warps of a kernel share a Hopper processor, and what its code can reach at most.

Sources: NVIDIA's Programming Guide for C++ (technical specifications of compute capability 9.0)
and Hopper Tuning Guide (occupancy); the H100 SXM data sheet (989 TFLOP/s in 16 bits without
sparsity, 67 in fp32, 3.35 TB/s, 132 processors).
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
PROCESSORS = 132
REGISTERS = 64 * KIB
PARTITIONS = 4  # of a processor: each has a quarter of the registers, and one scheduler
REGISTER_UNIT = 256  # registers of a warp are allocated in such steps
SHARED = 228 * KIB
SHARED_PER_PROGRAM = 227 * KIB
SHARED_RESERVED = 1 * KIB  # of each program, by the runtime
SHARED_UNIT = 128
WARPS, PROGRAMS = 64, 32  # resident, at most
WARP = 32
PEAK = 989e12  # FLOP/s of tensor cores in 16 bits
BANDWIDTH = 3.35e12  # bytes/s
TENSOR_FLOPS = 4096  # of a processor and clock: 512 multiply-adds of each of 4 tensor cores
CLOCK = PEAK / (PROCESSORS * TENSOR_FLOPS)  # 1.83 GHz, what the published peak implies
FMA_FLOPS = 256  # of a processor and clock, fp32: 128 multiply-adds
SPECIAL = 16  # exponentials and reciprocals of a processor and clock


def resident_programs(registers: int, warps: int, shared: int) -> int:
    """Programs of a kernel that a processor holds at once; 0 where not even one fits.

    Args:
        registers: of a thread.
        warps: of a program.
        shared: bytes of shared memory of a program.
    """
    if shared > SHARED_PER_PROGRAM:
        return 0
    of_warp = _rounded(registers * WARP, REGISTER_UNIT)
    by_registers = REGISTERS // PARTITIONS // of_warp * PARTITIONS // warps
    by_shared = SHARED // _rounded(shared + SHARED_RESERVED, SHARED_UNIT)
    return min(by_registers, by_shared, WARPS // warps, PROGRAMS)


def _rounded(number: int, unit: int) -> int:
    return -(-number // unit) * unit


@dataclass(frozen=True)
class TileCost:
    """Of one tile of one program, as counted in machine code.

    Attributes:
        needed: FLOPs that the mathematics asks for.
        tensor, fma: FLOPs that are issued to tensor cores, and as fp32 multiply-adds.
        special: exponentials, reciprocals and the like, of all threads.
        instructions: of all warps.
    """

    needed: int
    tensor: int
    fma: int
    special: int
    instructions: int

    def cycles(self) -> tuple[float, float]:
        """Of a processor: if all units work at once, and if products wait for the rest."""
        products = self.tensor / TENSOR_FLOPS
        units = self.special / SPECIAL, self.fma / FMA_FLOPS, self.instructions / PARTITIONS
        return max(products, *units), products + max(units)


def rates(cost: TileCost, programs: int) -> tuple[float, float]:
    """Needed FLOP/s of a GPU at most, and where nothing overlaps.

    Args:
        cost: of each tile.
        programs: of the launch, all equally long; those of a processor share its units.
    """
    filled = programs / _rounded(programs, PROCESSORS)
    best, worst = (cost.needed / cycles * CLOCK * PROCESSORS * filled for cycles in cost.cycles())
    return best, worst
