"""What `kernel_resources` reads from NVIDIA's tools, and what it computes from it."""

import pytest

pytest.importorskip("triton", reason="needs triton (pip install triton)")

from benchmarks import occupancy
from benchmarks.machine_code import Usage, parse_usage, tile_code
from benchmarks.occupancy import TileCost, rates, resident_programs

# As `cuobjdump -res-usage` (release 12.8) writes it of a kernel that spills.
RESOURCES = """
Resource usage:
 Common:
  GLOBAL:11 CONSTANT[4]:8
 Function query_kernel:
  REG:255 STACK:224 SHARED:1024 LOCAL:0 CONSTANT[0]:720 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SPILLS = """
        /*0100*/                   STL [R1+0x8], R3 ;
        /*0110*/                   STL.64 [R1+0x10], R4 ;
        /*0120*/                   LDL.LU R3, [R1+0x8] ;
        /*0130*/              @!P0 LDL.LU.64 R4, [R1+0x10] ;
        /*0140*/                   LDL.128 R8, [R1+0x20] ;
"""
# As `nvdisasm -c` writes it: a loop over whole tiles, then a longer one with masks.
LOOPS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_2:
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*0020*/              @!P1 LDGSTS.E.BYPASS.128 [R5], desc[UR8][R2.64] ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR4], R24, gsb0 ;
        /*0040*/               @P0 BRA `(.L_x_2) ;
.L_x_3:
        /*0050*/                   LDL R3, [R1+0x4] ;
        /*0060*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*0070*/                   HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR4], R24, gsb0 ;
        /*0080*/                   FSEL R9, R9, -INF , P2 ;
        /*0090*/                   FSEL R8, R8, -INF , P2 ;
        /*00a0*/              @!P3 BRA `(.L_x_3) ;
        /*00b0*/                   BRA `(.L_x_4) ;
.L_x_4:
        /*00c0*/                   EXIT ;
"""


def test_registers_and_spills_are_those_that_the_tools_name():
    assert parse_usage(RESOURCES, SPILLS) == Usage(255, 224, 4 + 8, 4 + 8 + 16)
    assert parse_usage(RESOURCES.replace("STACK:224", "STACK:0"), LOOPS).spill_stores == 0


def test_a_text_without_them_is_refused():
    with pytest.raises(ValueError, match="cuobjdump names no registers"):
        parse_usage("cuobjdump fatal   : no kernels in the file", "")


def test_the_loop_over_whole_tiles_is_counted():
    code = tile_code(LOOPS.replace("`(", "("))
    assert code.counts == {"HGMMA": 2, "LDGSTS": 1, "BRA": 1}
    assert code.wgmma_flops == 2 * 64 * 16 * (64 + 128)
    assert tile_code(LOOPS) == code


def test_a_kernel_without_products_is_counted_whole():
    text = "/*0000*/ LDG.E R2, [R2.64] ;\n/*0010*/ @P0 STG.E [R4.64], R2 ;\n/*0020*/ EXIT ;\n"
    assert tile_code(text).counts == {"LDG": 1, "STG": 1, "EXIT": 1}


@pytest.mark.parametrize(
    ("registers", "warps", "programs"),
    [
        # NVIDIA's Best Practices Guide for C++, "Calculating Occupancy": blocks of 128 threads with 37
        # registers are 12 on a processor of 64 Ki registers and 64 warps (75 %), of 320 threads 4 (63 %).
        (37, 4, 12),
        (37, 10, 4),
        # "each thread can use at most 32 registers" for all 64 warps.
        (32, 4, 16),
        (33, 4, 12),
        # The tuning guide's limits: 32 programs; 255 registers of a thread leave 8 warps.
        (16, 1, 32),
        (255, 8, 1),
        (255, 4, 2),
        (255, 16, 0),
    ],
)
def test_registers_bound_the_programs_of_a_processor(registers, warps, programs):
    assert resident_programs(registers, warps, shared=0) == programs


@pytest.mark.parametrize(
    ("shared_kib", "programs"),
    # Hopper Tuning Guide: 228 KB a processor, 227 KB a program, of which 1 KB each is reserved.
    [(227, 1), (227.5, 0), (113, 2), (113.5, 1), (75, 3), (56, 4)],
)
def test_shared_memory_bounds_them(shared_kib, programs):
    assert resident_programs(32, 4, int(shared_kib * 1024)) == programs


def test_the_published_peak_is_reached_by_products_alone():
    cost = TileCost(needed=10**6, tensor=10**6, fma=0, special=0, instructions=0)
    best, worst = rates(cost, programs=2 * occupancy.PROCESSORS)
    assert best == worst == pytest.approx(989e12)
    # One program more than processors takes as long as two for each.
    assert rates(cost, programs=133)[0] == pytest.approx(989e12 * 133 / 264)


def test_what_is_done_beside_the_products_slows_them():
    cost = TileCost(needed=4096, tensor=2 * 4096, fma=0, special=160, instructions=4)
    best, worst = rates(cost, programs=occupancy.PROCESSORS)
    # 2 clocks of products, 10 of exponentials: at once 10, in turn 12.
    assert best == pytest.approx(989e12 / 10)
    assert worst == pytest.approx(989e12 / 12)
