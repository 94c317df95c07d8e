"""`warm_kernels` compiles what a launch looks for, and nothing else; the GPU is simulated."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
pytest.importorskip("triton", reason="needs triton (pip install triton)")
# A driver that gives Triton a Hopper GPU to compile for, and launches nothing.
SCRIPT = """
import json, os, sys, types
from pathlib import Path
import torch
from triton.runtime import driver
from dattn_mcore.parallel import entry, platform

entry.prepare_imports("cpu")
platform.install("cpu")
driver.set_active(types.SimpleNamespace(
    get_current_device=lambda: 0,
    get_current_stream=lambda device: 0,
    get_current_target=platform.hopper_target,
    launcher_cls=lambda source, metadata: lambda *arguments, **named: None,
    utils=types.SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
        load_binary=lambda *arguments: (None, None, 0, 0, 1024),
        unload_module=lambda module: None,
    ),
))
from benchmarks.attention_backends import Case, Layer
from benchmarks.warm_kernels import collecting, compile_all, workers
from dattn_mcore.layers.attention import BACKENDS

def files():
    return sorted(str(path) for path in Path(os.environ["TRITON_CACHE_DIR"]).rglob("*"))

call = Case(Layer(4, 1, 32), 64, 32, torch.device("cpu")).backend(BACKENDS["triton"])[1]
with workers(2) as pool:
    with collecting() as variants:
        call()
    asked = files()
    compile_all(pool, variants)
ahead = files()
call()
said = {"names": sorted(one.name for one in variants), "asked": asked, "ahead": ahead}
json.dump({**said, "launched": files()}, sys.stdout)
"""


def test_a_launch_finds_its_kernels_in_the_cache(tmp_path):
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT],
        cwd=ROOT,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    said = json.loads(done.stdout)
    kernels = {name.rpartition(".")[2] for name in said["names"]}
    assert kernels == {"forward_kernel", "query_kernel", "key_kernel", "rotate_kernel"}
    assert not said["asked"]  # a collected launch compiles nothing
    assert sum(name.endswith(".cubin") for name in said["ahead"]) == len(said["names"])
    assert said["launched"] == said["ahead"]
