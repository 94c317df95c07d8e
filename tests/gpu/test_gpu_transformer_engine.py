"""Transformer Engine's spec on a GPU: the local spec's losses and checkpoints, and FP8."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dattn_mcore.training.implementation import transformer_engine_missing

ROOT = Path(__file__).parents[2]
# The digits model with sizes that FP8 products take: multiples of 16, blocks of 128.
SIZES = [
    "model.llm.hidden_size=256",
    "model.llm.ffn_hidden_size=512",
    "model.llm.head_dim=64",
    "model.llm.init_std=0.04",
    "model.projector.ffn_hidden_size=256",
]
RECIPES = ("delayed", "tensorwise", "blockwise")


@pytest.fixture(autouse=True)
def _needs_transformer_engine():
    if transformer_engine_missing() is not None:
        pytest.skip(f"needs Transformer Engine: {transformer_engine_missing()}")


def train(digits, run_dir, *arguments, steps=3):
    """Trains the digits model in a process of its own and returns its losses."""
    subprocess.run(
        [
            sys.executable,
            str(ROOT / "pretrain_dattn.py"),
            "--device",
            "gpu",
            *SIZES,
            f"data.annotations={digits / 'pretrain.json'}",
            f"log.run_dir={run_dir}",
            f"data.image_folder={digits / 'images'}",
            "data.image_backend=pillow",
            f"data.tokenizer={digits / 'tokenizer.model'}",
            "data.prepare=none",
            f"train.steps={steps}",
            "log.interval=1",
            "log.tensorboard=false",
            "train.precision=bf16",
            *arguments,
        ],
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_both_specs_have_the_same_losses(digits, tmp_path):
    """bf16 keeps 8 bits; the two round at other places."""
    losses = {
        name: train(digits, tmp_path / name, f"train.transformer_impl={name}", steps=8)
        for name in ("local", "transformer_engine")
    }
    assert losses["transformer_engine"] == pytest.approx(losses["local"], rel=2**-7)


@pytest.mark.parametrize("first", ["local", "transformer_engine"])
def test_a_checkpoint_of_one_spec_resumes_in_the_other(digits, tmp_path, first):
    other = {"local": "transformer_engine", "transformer_engine": "local"}[first]
    whole = train(digits, tmp_path / "whole", f"train.transformer_impl={first}", steps=6)
    run_dir = tmp_path / "parts"
    train(
        digits,
        run_dir,
        f"train.transformer_impl={first}",
        "checkpoint.save_interval=3",
        "checkpoint.keep=5",
        steps=6,
    )
    for folder in sorted((run_dir / "checkpoints").iterdir())[1:]:
        subprocess.run(["rm", "-r", str(folder)], check=True)
    resumed = train(digits, run_dir, f"train.transformer_impl={other}", steps=6)
    assert resumed[:3] == pytest.approx(whole[:3], rel=2**-7)
    assert resumed == pytest.approx(whole, rel=2**-6)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains(digits, tmp_path, recipe):
    """The loss falls as in bf16; FP8 keeps 3 bits of a number, so it follows within a tenth."""
    plain = train(digits, tmp_path / "bf16", steps=60)
    fp8 = train(digits, tmp_path / recipe, f"train.fp8={recipe}", steps=60)
    assert fp8 != plain
    assert sum(fp8[-10:]) == pytest.approx(sum(plain[-10:]), rel=0.1)
    assert fp8[-1] < 0.7 * fp8[0]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_resumed_fp8_run_goes_on(digits, tmp_path, recipe):
    fp8 = f"train.fp8={recipe}"
    whole = train(digits, tmp_path / "whole", fp8, steps=6)
    train(digits, tmp_path / "parts", fp8, "checkpoint.save_interval=3", steps=6)
    newest = max((tmp_path / "parts/checkpoints").iterdir())
    subprocess.run(["rm", "-r", str(newest)], check=True)
    resumed = train(digits, tmp_path / "parts", fp8, steps=6)
    assert len(resumed) == 6
    assert resumed == pytest.approx(whole, rel=2**-6)
