"""Every command with a Transformer Engine that is installed and broken."""

import subprocess
import sys

import pytest

from tests.unit.parallel.test_packages import ROOT, broken, environment


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder of packages, on the path of all commands below."""
    folder = tmp_path_factory.mktemp("site")
    broken(folder, "transformer_engine", "RuntimeError", "Found empty meta package")
    return folder


def call(site, *command):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(site),
    )


def train(site, digits, run_dir, *settings):
    return call(
        site,
        "pretrain_dattn.py",
        "--device=cpu",
        f"data.annotations={digits / 'pretrain.json'}",
        f"data.image_folder={digits / 'images'}",
        f"data.tokenizer={digits / 'tokenizer.model'}",
        f"log.run_dir={run_dir}",
        "data.prepare=none",
        "train.steps=1",
        "log.tensorboard=false",
        *settings,
    )


def test_a_run_trains_saves_and_is_exported(site, digits, tmp_path):
    """The writer of checkpoints starts processes, which import Megatron-Core again."""
    done = train(site, digits, tmp_path / "run", "train.transformer_impl=local")
    assert done.returncode == 0, done.stderr[-3000:]
    convert = ("-m", "tools.checkpoint_convert")
    done = call(site, *convert, "mcore-to-hf", tmp_path / "run", tmp_path / "hf")
    assert done.returncode == 0, done.stderr[-3000:]
    back = tmp_path / "back"
    done = call(site, *convert, "hf-to-mcore", tmp_path / "hf", back, "--processes", "2")
    assert done.returncode == 0, done.stderr[-3000:]


def test_asking_for_it_is_one_line_with_the_reason(site, digits, tmp_path):
    asked = "train.transformer_impl=transformer_engine"
    done = train(site, digits, tmp_path / "run", asked)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {asked} needs Transformer Engine, and it cannot be imported (")
    assert "Found empty meta package" in line
