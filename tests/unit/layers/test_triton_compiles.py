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
    "gemma2-split": (256, "bf16", True, True, False, 0),
    "gemma2-split-several": (256, "bf16", True, True, True, 0),
    "fp32": (128, "fp32", False, False, False, -1),
}
SCRIPT = """
import json, sys, torch
from benchmarks.kernel_resources import DTYPES, KERNELS, compile_helpers, compile_main
from dattn_mcore.layers.attention.triton_tuning import candidates

made = {}
for case, (head_dim, dtype, softcap, split, several, index) in json.loads(sys.argv[1]).items():
    made[case] = [("helper", vars(one)) for one in compile_helpers(head_dim, dtype)]
    for kernel in KERNELS:
        blocks = candidates(kernel, head_dim, DTYPES[dtype], torch.device("meta"))[index]
        options = dict(softcap=softcap, split=split, several=several)
        one = compile_main(kernel, head_dim, dtype, blocks, **options)
        made[case].append((kernel, vars(one)))
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
