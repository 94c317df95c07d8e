"""The Triton kernels, compiled for a Hopper GPU on a machine that needs none.

The interpreter accepts much that the compiler does not (types, layouts, loops), so a kernel that
passes `test_triton_attention` may still never have run anywhere. In a process of its own: in this
one, kernels are interpreted.
"""

import json
import os
import platform as machine
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
pytest.importorskip("triton", reason="needs triton (pip install triton)")
pytestmark = pytest.mark.skipif(
    machine.system() != "Linux", reason="Triton's compiler comes for Linux"
)
SHARED_PER_PROGRAM = (
    227 * 1024
)  # bytes, of a Hopper GPU (its programming guide, technical specifications)
# Mistral's and Gemma 2's with the blocks that are tried first, and single precision with the last:
# head size, dtype, soft-cap, split loops, several intervals, index of the candidate.
CASES = {
    "mistral": (128, "bf16", False, False, False, 0),
    "mistral-several": (128, "bf16", False, False, True, 0),
    "gemma2": (256, "bf16", True, False, False, 0),
    "gemma2-split": (256, "bf16", True, True, False, 0),
    "gemma2-split-several": (256, "bf16", True, True, True, 0),
    "fp32": (128, "fp32", False, False, False, -1),
    "fp32-256": (256, "fp32", False, False, False, 0),
}
SCRIPT = """
import json, sys, torch
from benchmarks.kernel_variants import DTYPES, HELPERS, KERNELS, compile_helper, compile_main
from benchmarks.kernel_variants import needed_flops
from dattn_mcore.layers.attention.triton_tuning import candidates

def plain(one):
    return {**vars(one), "code": {"counts": one.code.counts}}

made = {}
for case, (head_dim, dtype, softcap, split, several, index) in json.loads(sys.argv[1]).items():
    helpers = [compile_helper(helper, head_dim, dtype)[0] for helper in HELPERS]
    made[case] = [("helper", plain(one)) for one in helpers]
    for kernel in KERNELS:
        blocks = candidates(kernel, head_dim, DTYPES[dtype], torch.device("meta"))[index]
        options = dict(softcap=softcap, split=split, several=several)
        one = compile_main(kernel, head_dim, dtype, blocks, **options)
        issued = one.code.wgmma_flops * blocks.warps / 4
        ratio = issued / needed_flops(kernel, blocks, head_dim)
        made[case].append((kernel, {**plain(one), "products": ratio}))
json.dump(made, sys.stdout)
"""


@pytest.fixture(scope="module")
def compiled():
    """All kernels of all cases; what has been compiled before comes from Triton's own cache."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, json.dumps(CASES)],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES)
def test_kernels_compile_for_a_gpu(compiled, case):
    kernels = compiled[case]
    assert [name for name, _ in kernels if name != "helper"] == ["forward", "query", "key"]
    for name, made in kernels:
        assert made["shared"] <= SHARED_PER_PROGRAM
        # Sums made by atomics would come in any order: results would not repeat.
        assert not re.search(r"\b(atom|red)\.", made["assembly"])
        # fp32 must stay fp32; 16-bit factors must reach Hopper's tensor cores.
        assert ".tf32" not in made["assembly"]
        if name != "helper" and CASES[case][1] != "fp32":
            assert "wgmma.mma_async" in made["assembly"]


@pytest.mark.parametrize("case", CASES)
def test_no_length_is_compiled_in(compiled, case):
    """Packs differ in their numbers of rows: only the model's strides may choose a version."""
    for _, made in compiled[case]:
        model = {name for name in made["integers"] if re.search("_stride$|_group$|^heads$", name)}
        assert set(made["specialised"]) & set(made["integers"]) == model


@pytest.mark.parametrize(
    "case", [case for case, (head_dim, *_) in CASES.items() if head_dim == 256]
)
def test_what_is_tried_first_at_head_size_256_does_not_spill(compiled, case):
    for name, made in compiled[case]:
        spilled = {key: made[key] for key in ("stack", "spill_stores", "spill_loads")}
        assert not any(spilled.values()), (name, spilled)


@pytest.mark.parametrize("case", CASES)
def test_the_loop_over_tiles_is_found_in_the_machine_code(compiled, case):
    """What it multiplies is what the tile needs, no less; more only where that is known."""
    head_dim, dtype, *_ = CASES[case]
    for name, made in compiled[case]:
        if name != "helper" and dtype == "fp32":
            assert made["code"]["counts"]["FFMA"] > 0 and made["products"] == 0
        elif name != "helper":
            # Eight warps take 128 lines at once; a tile of 64 keys is multiplied twice.
            assert made["products"] == (1.5 if (name, head_dim) == ("key", 256) else 1.0)


def test_the_tables_of_the_documentation():
    """Of one head size: a row a kernel, and predictions below the roofline."""
    command = [
        "-W",
        "ignore",
        "-m",
        "benchmarks.kernel_resources",
        "--head-dims",
        "128",
        "--dtypes",
        "bf16",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if "|" in line]
    resources = {row[2]: row for row in rows if row[:2] == ["128", "bf16"]}
    assert list(resources) == ["forward", "query", "key", "rotate", "rotate back", "combine"]
    assert all(0 < int(row[4]) <= 255 and row[6] == "0, 0" for row in resources.values())
    limits = [row for row in rows if row[0] == "mistral"]
    assert len(limits) == 6
    for _, visual, kernel, _, warps, gflop, _, roofline, predicted in limits:
        # 32 heads of 128, 512 text rows: two products forward, three and four backward.
        products = {"forward": 2, "query": 3, "key": 4}[kernel]
        exact = products * 2 * 512 * int(visual) * 32 * 128 / 1e9
        assert float(gflop) == pytest.approx(exact, abs=0.05)
        low, high = map(int, predicted.split(" to "))
        assert 0 < low <= high <= int(roofline) <= 989
        assert int(warps) == 8
