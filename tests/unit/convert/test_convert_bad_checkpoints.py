"""Checkpoints that cannot be exported: one clear line each, and nothing half-written left."""

import json
import pickle
import shutil
from dataclasses import replace

import pytest
import torch

from tests.unit.checkpoint.runs import seal, vouch
from tests.unit.convert.convert_helpers import make_checkpoint, make_tokenizer, small_config
from tools.checkpoint_convert.__main__ import main


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A whole checkpoint."""
    folder = tmp_path_factory.mktemp("whole")
    make_checkpoint(folder / "a", small_config(make_tokenizer(folder)))
    return folder / "a"


def manifest_of(checkpoint):
    return json.loads((checkpoint / "dattn.json").read_text())


def rewrite(checkpoint, manifest):
    seal(checkpoint, manifest)


def data_file(checkpoint):
    return max(checkpoint.glob("*.distcp"), key=lambda file: file.stat().st_size)


def missing(checkpoint):
    data_file(checkpoint).unlink()


def truncated(checkpoint):
    file = data_file(checkpoint)
    file.write_bytes(file.read_bytes()[:-100])


def no_manifest(checkpoint):
    (checkpoint / "dattn.json").unlink()


def manifest_leads_outside(checkpoint):
    manifest = manifest_of(checkpoint)
    manifest["files"]["../tokenizer.model"] = [1, "0" * 64]
    rewrite(checkpoint, manifest)


def index_leads(place):
    """The index of tensors names another file; the manifest vouches for the index."""

    def change(checkpoint):
        file = checkpoint / ".metadata"
        index = pickle.loads(file.read_bytes())
        first = next(iter(index.storage_data))
        index.storage_data[first] = replace(index.storage_data[first], relative_path=place)
        file.write_bytes(pickle.dumps(index))
        vouch(checkpoint)

    return change


def another_architecture(checkpoint):
    """Mistral's weights under Gemma 2's configuration."""
    manifest = manifest_of(checkpoint)
    manifest["config"]["model"]["family"] = "gemma2"
    rewrite(checkpoint, manifest)


def another_tower(checkpoint):
    manifest = manifest_of(checkpoint)
    manifest["config"]["model"]["vision"]["kind"] = "clip"
    rewrite(checkpoint, manifest)


def unknown_model(checkpoint):
    manifest = manifest_of(checkpoint)
    manifest["config"]["model"]["experts"] = 8
    rewrite(checkpoint, manifest)


def pickle_checkpoint(checkpoint):
    """As Megatron-LM's older format lays it out."""
    shutil.rmtree(checkpoint)
    (checkpoint / "mp_rank_00").mkdir(parents=True)
    torch.save({}, checkpoint / "mp_rank_00/model_optim_rng.pt")


def export(checkpoint):
    """Not a checkpoint at all, but what comes out of one."""
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text('{"model_type": "dattn"}')


BAD = [
    (missing, "_0.distcp is missing"),
    (truncated, "_0.distcp has "),
    (no_manifest, "holds no finished checkpoint"),
    (manifest_leads_outside, "'../tokenizer.model'; an index may only name files of its own"),
    (index_leads("../tokenizer.model"), "'../tokenizer.model'; an index may only name files of"),
    (index_leads("/etc/hostname"), "'/etc/hostname'; an index may only name files of its own"),
    (index_leads("other.distcp"), "names other.distcp, which dattn.json does not"),
    (another_architecture, "tensors do not fit the configuration"),
    (another_tower, "extra vision.patch_embedding.bias"),
    (unknown_model, "unknown configuration key 'model.experts'"),
    (pickle_checkpoint, "holds pickled weights (mp_rank_00/model_optim_rng.pt)"),
    (export, "is a Hugging Face folder"),
]


@pytest.mark.parametrize("several", [(), ("--processes", "2")], ids=["one", "two"])
@pytest.mark.parametrize(("damage", "message"), BAD)
def test_one_line_and_nothing_left(whole, tmp_path, capsys, damage, message, several):
    checkpoint = shutil.copytree(whole, tmp_path / "a")
    shutil.copy(whole.parent / "tokenizer.model", tmp_path)
    damage(checkpoint)
    assert main(["mcore-to-hf", str(checkpoint), str(tmp_path / "out"), *several]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and message in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "tokenizer.model"]
    # `inspect` and `verify` say the same.
    for command in (["inspect", str(checkpoint)], ["verify", str(checkpoint), str(whole)]):
        if damage is not export:
            assert main(command) == 2
            assert message in capsys.readouterr().err
