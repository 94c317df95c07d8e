"""A manifest that is not as it was written is a damaged checkpoint: the older whole one is used."""

import json
import random
import shutil

import pytest
import torch

from dattn_mcore.checkpoint import folders
from dattn_mcore.checkpoint.load import choose_checkpoint
from dattn_mcore.checkpoint.manifest import read_manifest
from dattn_mcore.checkpoint.same_run import check_same_run
from dattn_mcore.errors import CheckpointError
from dattn_mcore.parallel.groups import single_process
from tests.unit.checkpoint.runs import IDENTITY, seal, small_run, vouch
from tests.unit.convert.convert_helpers import make_checkpoint
from tools.checkpoint_convert.__main__ import main
from tools.checkpoint_convert.dist_checkpoint import DistCheckpoint


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_every_flipped_bit_is_noticed(checkpoints):
    """400 of them, one at a time."""
    newest = checkpoints / "step_00000002"
    path, whole = newest / "dattn.json", (newest / "dattn.json").read_bytes()
    assert read_manifest(newest)["step"] == 2
    for bit in random.Random(7).sample(range(8 * len(whole)), 400):
        flip(path, bit)
        with pytest.raises(
            CheckpointError, match=r"dattn.json is damaged|may only name files"
        ) as e:
            read_manifest(newest)
        assert "\n" not in str(e.value)
        path.write_bytes(whole)


@pytest.mark.parametrize("place", ['"step": 2', '"format": 2', '"digest": "', '"lr": 0.002'])
def test_the_older_checkpoint_is_used_loudly(checkpoints, caplog, capsys, place):
    """By a run that goes on, and by the tools."""
    newest = checkpoints / "step_00000002"
    whole = (newest / "dattn.json").read_text()
    flip(newest / "dattn.json", 8 * (whole.index(place) + len(place) - 1))
    with single_process():
        folder, manifest = choose_checkpoint(checkpoints)
        with pytest.raises(CheckpointError, match="cannot be read: .* is damaged .*step_00000001"):
            choose_checkpoint(checkpoints, fall_back=False)
    assert (folder.name, manifest["step"]) == ("step_00000001", 1)
    assert f"{newest} cannot be read" in caplog.text and "is damaged" in caplog.text
    caplog.clear()
    assert DistCheckpoint(checkpoints.parent).step == 1
    assert f"{newest} cannot be read" in caplog.text
    assert f"{folder} is taken instead" in caplog.text
    assert main(["inspect", str(newest)]) == 2  # named itself, no other is taken
    assert "is damaged" in capsys.readouterr().err


def altered(fields, **changes):
    return {name: value for name, value in (fields | changes).items() if value is not ...}


WRONG = [
    *({"step": value} for value in (-1, 10**9, 2.0, 6.9, "2", None, True, 1, ...)),
    *({"format": value} for value in (99, 0, "2", 2.0, True, None, ...)),
    *({"layout": value} for value in (None, [], [1], [0, 1], [1.0, 1], "11", [1, True], ...)),
    *({"files": value} for value in ({}, [], None, {"a": 1}, {"a": [1]}, {"a": [1, "b"]}, ...)),
    *({"config": value} for value in ({}, [], None, {"model": 1}, ...)),
    *({"data_fingerprint": value} for value in (3, None, [], ...)),
    {"data": 3},
    {"tokenizer": 3},
    {"tokenizer": {"path": 3}},
    {"unknown": 3},
]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
@pytest.mark.parametrize("number", [1, 2])
def test_a_wrong_field_is_damage(checkpoints, old_checkpoint, number, wrong):
    """Also under a digest that is right, and in a format that has none."""
    newest = old_checkpoint if number == 1 else checkpoints / "step_00000002"
    fields = json.loads((newest / "dattn.json").read_text())
    changed = altered(fields, **wrong)
    if number == 1:
        (newest / "dattn.json").write_text(json.dumps(changed))
    else:
        seal(newest, changed)
    with single_process(), pytest.raises(CheckpointError) as error:
        choose_checkpoint(newest, fall_back=False)
    assert "\n" not in str(error.value)
    assert main(["inspect", str(newest)]) == 2


def test_a_setting_of_another_type_is_damage_in_format_1(old_checkpoint):
    fields = json.loads((old_checkpoint / "dattn.json").read_text())
    fields["config"]["optim"]["lr"] = [1]
    seal(old_checkpoint, fields)
    with pytest.raises(CheckpointError, match=r"is damaged \(optim.lr=\[1\] must be of type float"):
        read_manifest(old_checkpoint)


def test_a_file_that_nothing_vouches_for_is_damage(checkpoints):
    newest = checkpoints / "step_00000002"
    fields = json.loads((newest / "dattn.json").read_text())
    for name in fields["files"]:
        seal(newest, fields | {"files": {k: v for k, v in fields["files"].items() if k != name}})
        with single_process(), pytest.raises(CheckpointError, match=r"lacks|which dattn.json does"):
            choose_checkpoint(newest, fall_back=False)


@pytest.mark.parametrize("old", [False, True], ids=["format 2", "format 1"])
def test_the_step_is_the_one_of_the_folder_and_of_the_content(checkpoints, old_checkpoint, old):
    """Weights of one step never go with the data and the schedule of another."""
    newest = old_checkpoint if old else checkpoints / "step_00000002"
    moved = newest.with_name("step_00000005")
    shutil.copytree(newest, moved)
    with pytest.raises(CheckpointError, match="of step 2, in a folder of step 5"):
        read_manifest(moved)
    vouch(moved, step=5)
    with single_process(), pytest.raises(CheckpointError, match="is of step 2, and the manifest"):
        choose_checkpoint(moved, fall_back=False)
    common = torch.load(moved / "common.pt", weights_only=True)
    torch.save(common | {"step": 5}, moved / "common.pt")
    vouch(moved)
    with single_process():
        assert choose_checkpoint(moved, fall_back=False)[1]["step"] == 5
    # A copy under a name of the user's own is what it was.
    copy = shutil.copytree(newest, newest.with_name("best"))
    assert DistCheckpoint(copy).step == 2


def test_converted_weights_are_no_run(tmp_path, small_configuration):
    """They have no step to go on from, and no layout; their manifest says so."""
    root = tmp_path / "run/checkpoints"
    make_checkpoint(root / "step_00000003", small_configuration)
    fields = read_manifest(root / "step_00000003")
    assert (fields["step"], fields["layout"], fields["data_fingerprint"]) == (0, None, None)
    with small_run(root, small_configuration) as run:
        found = choose_checkpoint(root)
        with pytest.raises(CheckpointError, match="holds converted weights .*init_from"):
            check_same_run(run.config, found[1], found[0], IDENTITY)


def test_a_folder_that_cannot_be_read_is_reported_on_every_rank(tmp_path, monkeypatch):
    """By rank 0, which lists for all: it must not leave the others waiting."""

    def refuses(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(folders, "find_checkpoints", refuses)
    with (
        single_process(),
        pytest.raises(CheckpointError, match="cannot be read .Permission denied"),
    ):
        choose_checkpoint(tmp_path)
