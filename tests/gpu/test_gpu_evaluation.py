"""The benchmarks' run on a GPU: alone and one process per GPU, in batches and row by row."""

import os
import subprocess
import sys

import torch

from tests.unit.evaluation.conftest import ROOT, tiny_model  # noqa: F401 (a fixture)
from tests.unit.evaluation.tiny_runs import answers, run, scores


def test_batches_on_a_gpu(tiny_model, tmp_path):  # noqa: F811
    """In float32 batches change no answer; the score file says what it ran on."""
    for name, size in (("eight", 8), ("one", 1)):
        assert run(tiny_model, tmp_path / name, "--device=gpu", f"--batch-size={size}") == 0
    assert answers(tmp_path / "eight") == answers(tmp_path / "one")
    device = torch.accelerator.current_accelerator()
    assert scores(tmp_path / "eight")["run"]["decoding"]["device"] == device.type


def test_one_process_per_gpu(tiny_model, tmp_path):  # noqa: F811
    """All GPUs of the machine give the answers of one."""
    count = torch.accelerator.device_count()
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={count}"]
    command = [*launcher, "--standalone", "-m", "dattn_mcore.evaluation", "run", "--device=gpu"]
    command += [f"--model={tiny_model / 'tiny'}", f"--data={tiny_model / 'val'}"]
    command += [f"--out={tmp_path / 'all'}", "--max-new-tokens=6"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=environment, cwd=ROOT, check=True, timeout=600)
    assert run(tiny_model, tmp_path / "one", "--device=gpu") == 0
    assert answers(tmp_path / "all") == answers(tmp_path / "one")
