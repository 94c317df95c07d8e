"""Nothing in a checkpoint can run code, whoever wrote it; what is no code still resumes."""

import io
import json
import os
import pickle
from dataclasses import replace

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from dattn_mcore.checkpoint.content import only_weights
from dattn_mcore.checkpoint.load import choose_checkpoint
from dattn_mcore.config.load import from_dict
from dattn_mcore.errors import CheckpointError
from dattn_mcore.parallel import platform
from dattn_mcore.parallel.groups import single_process
from tests.unit.checkpoint.runs import payload, point_at, read_index, small_run, vouch
from tools.checkpoint_convert.__main__ import main
from tools.checkpoint_convert.dist_checkpoint import DistCheckpoint

TENSOR = "decoder.final_layernorm.weight"
OLD_RNG = "rng_pp1_tp1/shard_0.0_1.1"


def common(folder, data):
    (folder / "common.pt").write_bytes(data)
    vouch(folder)


def another_backend(folder, data):
    """Megatron-Core chooses its reader by this file."""
    names = {"sharded_backend": "zarr", "sharded_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(names))
    point_at(folder, TENSOR, data, as_bytes=False)


FORGERIES = {
    "a tensor called bytes": lambda folder, data: point_at(folder, TENSOR, data, as_bytes=True),
    "a tensor": lambda folder, data: point_at(folder, TENSOR, data, as_bytes=False),
    "common.pt": common,
    "another backend": another_backend,
}


@pytest.mark.parametrize("forced", ["", "1"], ids=["plain", "forced"])
@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_checkpoint_runs_nothing(
    checkpoints, small_configuration, tmp_path, monkeypatch, capsys, forgery, forced
):
    """In a run that resumes, in one that starts from it, and in every tool."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", forced)
    target, newest = tmp_path / "called", checkpoints / "step_00000002"
    FORGERIES[forgery](newest, payload(target))
    with small_run(checkpoints, small_configuration) as run:
        try:
            assert run.resume() == 1  # the older one, which is whole
        except CheckpointError as error:
            assert "\n" not in str(error)
    assert not target.exists()
    for command in (
        ["inspect", str(newest)],
        ["verify", str(newest), str(checkpoints / "step_00000001")],
        ["mcore-to-hf", str(newest), str(tmp_path / "out")],
    ):
        main(command)
        lines = capsys.readouterr().err.splitlines()
        assert not target.exists(), command
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert not (tmp_path / "out").exists()
    # It is an attack: PyTorch runs it where it is let.
    torch.load(io.BytesIO(payload(target)), weights_only=False)
    assert target.exists()


@pytest.mark.parametrize("forced", ["", "1"], ids=["plain", "forced"])
def test_a_byte_entry_of_an_older_checkpoint_runs_nothing(
    old_checkpoint, tmp_path, monkeypatch, caplog, forced
):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", forced)
    config = from_dict(json.loads((old_checkpoint / "dattn.json").read_text())["config"])
    target = tmp_path / "called"
    point_at(old_checkpoint, OLD_RNG, payload(target), as_bytes=False)
    with (
        small_run(old_checkpoint.parent, config) as run,
        pytest.raises(CheckpointError, match="no checkpoint in"),
    ):
        run.resume()
    assert f"{OLD_RNG} holds what" in caplog.text and "could run code" in caplog.text
    assert not target.exists()


def test_an_older_checkpoint_resumes(old_checkpoint, tmp_path):
    """With its byte entry: weights, optimizer and RNG."""
    config = from_dict(json.loads((old_checkpoint / "dattn.json").read_text())["config"])
    index = read_index(old_checkpoint)
    assert isinstance(index.state_dict_metadata[OLD_RNG], BytesStorageMetadata)
    place = next(v for k, v in index.storage_data.items() if k.fqn == OLD_RNG)
    data = (old_checkpoint / place.relative_path).read_bytes()[place.offset :][: place.length]
    (rng,) = torch.load(io.BytesIO(data), weights_only=True)
    source = DistCheckpoint(old_checkpoint)
    with small_run(old_checkpoint.parent, config) as run:
        assert run.resume() == 2
        now = platform.rng_state()
        assert torch.equal(now["torch"], rng["torch"])
        assert now["tracker"].keys() == rng["tracker"].keys()
        assert all(torch.equal(now["tracker"][k], rng["tracker"][k]) for k in rng["tracker"])
        weights = run.weights()
        assert torch.equal(weights[TENSOR], source.read(TENSOR))
        run.step(3)
        run.saver.save(3)
    new = old_checkpoint.parent / "step_00000003"
    state = torch.load(new / "common.pt", weights_only=True)
    assert {g["step"] for g in state["optimizer"]["optimizer"]["param_groups"]} == {3}


def test_a_checkpoint_holds_tensors_only(checkpoints, small_configuration):
    """No byte entry is written, and the RNG goes on where it stood."""
    index = read_index(checkpoints / "step_00000002")
    kinds = {type(stored).__name__ for stored in index.state_dict_metadata.values()}
    assert kinds == {"TensorStorageMetadata"}
    with small_run(checkpoints, small_configuration) as run:
        run.step(3)
        torch.rand(7)
        run.saver.save(3)
        expected, following = platform.rng_state(), torch.rand(5)
    with small_run(checkpoints, small_configuration) as run:
        torch.manual_seed(99)
        assert run.resume() == 3
        now = platform.rng_state()
        assert torch.equal(now["torch"], expected["torch"])
        assert all(torch.equal(now["tracker"][k], v) for k, v in expected["tracker"].items())
        assert torch.equal(torch.rand(5), following)


def test_pytorch_reads_weights_only_inside(tmp_path):
    """Also where the call itself asks for anything, as PyTorch's planner does."""
    data = payload(tmp_path / "called")
    with only_weights(), pytest.raises(pickle.UnpicklingError):
        torch.load(io.BytesIO(data), weights_only=False)
    assert not (tmp_path / "called").exists()


def test_the_environment_is_as_it_was(checkpoints, small_configuration, monkeypatch):
    """What guards the reading of a checkpoint ends with it."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    with small_run(checkpoints, small_configuration) as run:
        assert run.resume() == 2
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_an_index_leads_to_files_of_the_manifest_only(checkpoints, tmp_path):
    """In a run as in the tools: a shard outside the folder has no hash."""
    newest = checkpoints / "step_00000002"
    for place, message in (("../x.distcp", "may only name files of its own"), ("x.distcp", "not")):
        index = read_index(newest)
        first = next(iter(index.storage_data))
        index.storage_data[first] = replace(index.storage_data[first], relative_path=place)
        (newest / ".metadata").write_bytes(pickle.dumps(index))
        vouch(newest)
        with single_process(), pytest.raises(CheckpointError, match=message):
            choose_checkpoint(newest, fall_back=False)


OTHERS = [
    {},
    {"optimizer": 3},
    {"optimizer": {"optimizer": {}}},
    {"optimizer": {"optimizer": {"param_groups": [1]}}},
    {"optimizer": {"optimizer": {"param_groups": [{"step": "x"}]}}},
]


@pytest.mark.parametrize("content", OTHERS, ids=str)
def test_other_plain_values_are_one_line(checkpoints, small_configuration, content):
    """What nobody but a forger writes is no traceback either."""
    newest = checkpoints / "step_00000002"
    torch.save({"step": 2, **content}, newest / "common.pt")
    vouch(newest)
    with (
        small_run(checkpoints, small_configuration) as run,
        pytest.raises(CheckpointError, match="step_00000002 does not fit this run") as error,
    ):
        run.resume()
    assert "\n" not in str(error.value)
