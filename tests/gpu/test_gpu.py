"""What only a GPU can show: its flash kernels, its decoder, and the same losses as on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dattn_mcore.layers.attention import BACKENDS
from dattn_mcore.layers.layout import build_seq_params
from dattn_mcore.parallel import platform
from tests.unit.layers.test_attention import LAYOUTS, MODES, make_inputs, options_for, run

ROOT = Path(__file__).parents[2]


# bf16 keeps 8 bits: the kernels round inputs, weights and outputs each by up to 2^-9.
@pytest.mark.parametrize("mode", MODES, ids="-".join)
def test_flash_kernels_equal_reference(mode):
    device = platform.current_device()
    options = options_for(mode)
    params = build_seq_params(LAYOUTS, t2v_position=options.t2v_position, device=device)
    exact = [x.detach().bfloat16().to(device) for x in make_inputs(params)]
    outputs = {}
    for name, dtype in (("reference", torch.float32), ("sdpa", torch.bfloat16)):
        inputs = [x.to(dtype).requires_grad_() for x in exact]
        text, visual = run(name, inputs, params, options)
        total = text.float().pow(2).sum() + (0 if visual is None else visual.float().pow(2).sum())
        grads = torch.autograd.grad(total, inputs, allow_unused=True)
        outputs[name] = [text, visual, *grads]
    assert set(BACKENDS) == set(outputs)
    for actual, expected in zip(outputs["sdpa"], outputs["reference"], strict=True):
        if expected is not None and actual is not None:
            scale = expected.float().abs().max().clamp(min=1.0)
            assert ((actual.float() - expected.float()).abs().max() / scale) < 0.03


def losses(digits, run_dir, *arguments):
    """Three fp32 steps of the digits model in a process of its own."""
    subprocess.run(
        [
            *(sys.executable, str(ROOT / "pretrain_dattn.py"), *arguments, "train.steps=3"),
            *(f"data.annotations={digits / 'pretrain.json'}", f"log.run_dir={run_dir}"),
            *(
                f"data.image_folder={digits / 'images'}",
                f"data.tokenizer={digits / 'tokenizer.model'}",
            ),
            *("log.interval=1", "log.tensorboard=false", "data.prepare=none"),
            "data.image_backend=pillow",
        ],
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("policy", ["stretch", "anyres_stretch"])
def test_training_equals_the_cpu(digits, tmp_path, policy):
    """fp32 on both; a GPU adds in another order, and may use TF32 nowhere."""
    views = f"data.image_policy={policy}"
    on_cpu = losses(digits, tmp_path / "cpu", "--device", "cpu", views)
    on_gpu = losses(digits, tmp_path / "gpu", "--device", "gpu", views)
    assert on_gpu == pytest.approx(on_cpu, abs=1e-4)


def test_bf16_training_on_the_gpu(digits, tmp_path):
    on_cpu = losses(digits, tmp_path / "cpu", "--device", "cpu")
    on_gpu = losses(digits, tmp_path / "gpu", "--device", "gpu", "train.precision=bf16")
    assert on_gpu == pytest.approx(on_cpu, rel=0.03)


@pytest.mark.parametrize("policy", ["stretch", "anyres_letterbox"])
def test_gpu_decode_is_close_to_the_cpus(digits, policy):
    """`mixed` decode with fancy upsampling: within a few grey levels on smooth images."""
    pytest.importorskip("nvidia.dali")
    from tests.unit.data.folder_loader import FolderLoader

    paths = sorted(p.relative_to(digits / "images") for p in (digits / "images").rglob("*.jpg"))
    wanted = [(str(i), str(path)) for i, path in enumerate(paths[:16])]
    settings = dict(size=56, policy=policy, mean=(0.5,) * 3, threads=2, max_pixels=10**7)
    settings["grids"] = ((2, 1), (1, 3))
    tiles = [
        FolderLoader(
            digits / "images", backend="dali", device=device, device_id=0, **settings
        ).load(wanted)
        for device in ("cpu", "gpu")
    ]
    difference = (tiles[0].cpu().int() - tiles[1].cpu().int()).abs()
    assert difference.max() <= 8 and difference.float().mean() < 0.5
