"""The self-restart: what it starts, and when it refuses."""

import os
import sys

import pytest

from dattn_mcore.errors import ConfigError
from dattn_mcore.parallel import gpus
from dattn_mcore.training import launch


@pytest.fixture
def started(monkeypatch):
    """Records the command instead of becoming it."""
    seen = {}

    def execve(path, command, environment):
        seen.update(path=path, command=command, environment=environment)

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(sys, "argv", ["pretrain_dattn.py", "--tp", "4"])
    return seen


def machine_with(monkeypatch, count):
    monkeypatch.setattr(gpus, "gpu_available", lambda: count > 0)
    monkeypatch.setattr(gpus, "gpu_count", lambda: count)


def test_restarts_with_the_same_arguments_and_a_clean_environment(monkeypatch, started, capsys):
    machine_with(monkeypatch, 0)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("HOME_OF_MINE", "kept")
    launch.restart_under_torchrun(8, "auto", ["--tp", "4", "--pp", "2"])
    command = started["command"]
    assert command[1:3] == ["-m", "torch.distributed.run"]
    assert command[command.index("--nproc-per-node") + 1] == "8"
    assert command[-5:] == ["pretrain_dattn.py", "--tp", "4", "--pp", "2"]
    assert "WORLD_SIZE" not in started["environment"]
    assert "MASTER_PORT" not in started["environment"]
    assert started["environment"]["HOME_OF_MINE"] == "kept"
    assert "one process started and 8 needed" in capsys.readouterr().out


def test_restarts_as_another_program(monkeypatch, started, capsys):
    machine_with(monkeypatch, 0)
    launch.restart_under_torchrun(2, "cpu", ["--tp", "2"], ["-m", "dattn_mcore.cli", "train"])
    words = ["--nproc-per-node", "2", "-m", "dattn_mcore.cli", "train", "--tp", "2"]
    assert started["command"][-7:] == words
    assert f"restarting as torchrun {' '.join(words)}\n" in capsys.readouterr().out


def test_too_few_gpus_is_an_error(monkeypatch, started):
    machine_with(monkeypatch, 2)
    with pytest.raises(ConfigError, match="needs 8 processes with a GPU each.* has 2 GPUs") as e:
        launch.restart_under_torchrun(8, "auto", [])
    assert "\n" not in str(e.value)
    assert not started


def test_cpu_processes_need_no_gpus(monkeypatch, started):
    machine_with(monkeypatch, 2)
    launch.restart_under_torchrun(8, "cpu", [])
    assert started
