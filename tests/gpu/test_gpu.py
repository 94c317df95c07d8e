"""What only a GPU can show: its flash kernels, its decoder, and the same losses as on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dattn_mcore.errors import ConfigError
from dattn_mcore.layers.attention import BACKENDS, choose_backend
from dattn_mcore.layers.layout import build_seq_params
from dattn_mcore.parallel import platform
from tests.unit.layers.test_attention import LAYOUTS, MODES, make_inputs, options_for, run
from tests.unit.layers.test_interleaved_attention import MANY

ROOT = Path(__file__).parents[2]


# bf16 keeps 8 bits: the kernels round inputs, weights and outputs each by up to 2^-9.
@pytest.mark.parametrize("layouts", [LAYOUTS, MANY], ids=["few", "many-images"])
@pytest.mark.parametrize("mode", MODES, ids="-".join)
@pytest.mark.parametrize("name", sorted(set(BACKENDS) - {"reference"}))
def test_kernels_equal_reference(name, mode, layouts):
    device = platform.current_device()
    options = options_for(mode)
    try:
        choose_backend(name, options, device.type, torch.bfloat16, 64)
    except ConfigError as error:
        pytest.skip(str(error))
    params = build_seq_params(layouts, t2v_position=options.t2v_position, device=device)
    exact = [x.detach().bfloat16().to(device) for x in make_inputs(params, dim=64)]
    outputs = {}
    for backend, dtype in (("reference", torch.float32), (name, torch.bfloat16)):
        inputs = [x.to(dtype).requires_grad_() for x in exact]
        text, visual = run(backend, inputs, params, options)
        total = text.float().pow(2).sum() + (0 if visual is None else visual.float().pow(2).sum())
        grads = torch.autograd.grad(total, inputs, allow_unused=True)
        outputs[backend] = [text, visual, *grads]
    for actual, expected in zip(outputs[name], outputs["reference"], strict=True):
        if expected is not None and actual is not None:
            scale = expected.float().abs().max().clamp(min=1.0)
            assert ((actual.float() - expected.float()).abs().max() / scale) < 0.03


def losses(digits, run_dir, *arguments):
    """Three fp32 steps of the digits model in a process of its own."""
    subprocess.run(
        [
            sys.executable,
            str(ROOT / "pretrain_dattn.py"),
            *arguments,
            "train.steps=3",
            f"data.annotations={digits / 'pretrain.json'}",
            f"log.run_dir={run_dir}",
            f"data.image_folder={digits / 'images'}",
            f"data.tokenizer={digits / 'tokenizer.model'}",
            "log.interval=1",
            "log.tensorboard=false",
            "data.prepare=none",
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


@pytest.mark.parametrize(
    "settings",
    [
        ["attention.fold_visual_projection=false", "attention.skip_last_visual_rows=false"],
        ["train.recompute_visual_chunk=48", "train.loss_chunk=16"],
        ["train.recompute_visual_chunk=48", "train.recompute=full"],
    ],
    ids=["plain", "chunks", "chunks-full"],
)
def test_visual_path_on_the_gpu(digits, tmp_path, settings):
    """fp32, three steps: the sums stand in another order only."""
    as_default = losses(digits, tmp_path / "default", "--device", "gpu")
    otherwise = losses(digits, tmp_path / "otherwise", "--device", "gpu", *settings)
    assert otherwise == pytest.approx(as_default, abs=1e-4)


def test_peak_memory_is_the_gpus():
    """What the benchmarks measure with: a tensor that is gone again counts."""
    from benchmarks.measure import peak_bytes

    device = platform.current_device()
    peak = peak_bytes(lambda: torch.ones(2**20, device=device), device)
    assert 4 * 2**20 <= peak < 5 * 2**20


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


def test_decoding_beside_a_busy_gpu_gives_each_image_its_own_pixels(digits, monkeypatch):
    """Copies out of DALI's buffers queue behind training; the next batch must not overtake them."""
    pytest.importorskip("nvidia.dali")
    from dattn_mcore.data import decode_dali
    from dattn_mcore.data.image_files import read_image_file

    folder = digits / "images"
    names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*.jpg"))[:24]]
    images = [read_image_file(folder, name, name, 10**7) for name in names]
    monkeypatch.setattr(decode_dali, "_MAX_BATCH", 2)
    device = platform.current_device()
    decoder = decode_dali.DaliDecoder(2, "gpu", device.index)
    quiet = decoder.decode(images)
    factor = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    for _ in range(200):  # some tenths of a second of work, queued
        torch.mm(factor, factor)
    for alone, beside in zip(quiet, decoder.decode(images), strict=True):
        assert torch.equal(alone, beside)
