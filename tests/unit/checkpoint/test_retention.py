"""Which checkpoints a save deletes: own, whole and older ones only, and never the last."""

import os
import shutil
from dataclasses import replace

import pytest

from dattn_mcore.checkpoint import folders
from dattn_mcore.checkpoint.folders import list_checkpoints
from dattn_mcore.checkpoint.load import choose_checkpoint
from dattn_mcore.errors import CheckpointError
from dattn_mcore.parallel.groups import single_process
from tests.unit.checkpoint.runs import small_run


def names(root):
    return sorted(path.name for path in root.iterdir())


@pytest.fixture
def keep(small_configuration):
    """The configuration with another `checkpoint.keep`."""

    def change(number):
        checkpoint = replace(small_configuration.checkpoint, keep=number)
        return replace(small_configuration, checkpoint=checkpoint)

    return change


def damaged(folder, how):
    if how == "shard":
        shard = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    elif how == "truncated":
        shard = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
        shard.write_bytes(shard.read_bytes()[:-9])
    else:
        (folder / "dattn.json").write_bytes(b"{")


@pytest.mark.parametrize("how", ["shard", "truncated", "manifest"])
def test_what_was_just_saved_stays_beside_a_newer_damaged_one(checkpoints, keep, how):
    """Steps 4 and 6, of which 6 is damaged: step 5 follows 4, and 6 is nobody's business."""
    root = checkpoints
    shutil.rmtree(root / "step_00000002")
    with small_run(root, keep(9)) as run:
        run.resume()
        for step in (4, 6):
            run.step(step)
            run.saver.save(step)
    damaged(root / "step_00000006", how)
    with small_run(root, keep(1)) as run:
        assert run.resume() == 4
        run.step(5)
        assert run.saver.save(5) == root / "step_00000005"
    assert names(root) == ["step_00000005", "step_00000006"]
    with single_process():
        assert choose_checkpoint(root)[0] == root / "step_00000005"
    with small_run(root, keep(1)) as run:
        assert run.resume() == 5
        run.step(6)
        run.saver.save(6)  # in the damaged one's place
    assert names(root) == ["step_00000006"]
    with single_process():
        assert choose_checkpoint(root)[0] == root / "step_00000006"


def test_damaged_ones_do_not_count(checkpoints, keep):
    """With keep=2, a damaged checkpoint in between costs no whole one."""
    with small_run(checkpoints, keep(2)) as run:
        run.step(2)
        damaged(checkpoints / "step_00000002", "truncated")
        run.saver.save(3)
        assert names(checkpoints) == ["step_00000001", "step_00000002", "step_00000003"]
        run.saver.save(4)
    assert names(checkpoints) == ["step_00000002", "step_00000003", "step_00000004"]


USERS = (
    "step_best",
    "step_00000006_backup",
    "step_6",
    "step_0000006",
    "step_000000006",
    "step_",
    "step_00000006.bak",
    "step_best.tmp",
    "step_00000006x.tmp",
    "step_٠٠٠٠٠٠٠٦",
    "step_-0000006",
)


def test_a_users_folders_are_not_touched(checkpoints, keep):
    """They are neither listed nor newest nor counted, and stay, whole checkpoints or not."""
    root = checkpoints
    for name in USERS:
        shutil.copytree(root / "step_00000001", root / name)
    (root / "step_00000009").write_text("a file")
    (root / "step_00000008").symlink_to(root / "step_best")
    (root / "step_00000007.tmp").symlink_to(root / "step_best")
    unknown = root / "step_00000005"
    unknown.mkdir()
    (unknown / "notes.txt").write_text("mine")
    (root / "step_00000004.tmp").mkdir()  # an interrupted save's
    (root / "step_00000001.old.tmp").mkdir()
    assert [path.name for path in list_checkpoints(root)] == [
        "step_00000008",
        "step_00000005",
        "step_00000002",
        "step_00000001",
    ]
    with small_run(root, keep(1)) as run:
        assert run.resume() == 2
        run.step(3)
        run.saver.save(3)
    left = [*USERS, "step_00000009", "step_00000008", "step_00000007.tmp", "step_00000005"]
    assert names(root) == sorted([*left, "step_00000003"])
    assert (unknown / "notes.txt").read_text() == "mine"
    assert (root / "step_best/dattn.json").is_file()


def test_newest_is_by_number_beyond_eight_digits(tmp_path):
    for name in ("step_99999999", "step_100000000", "step_00000003"):
        (tmp_path / name).mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step_100000000",
        "step_99999999",
        "step_00000003",
    ]


def test_a_checkpoint_is_replaced_when_the_new_one_is_whole(checkpoints, keep, monkeypatch):
    """Killed in the middle of a replacement, there is always a whole one under its name or `.tmp`."""
    root, seen = checkpoints, []
    original = folders.delete

    def noted(path):
        seen.append((path.name, names(root)))
        original(path)

    monkeypatch.setattr(folders, "delete", noted)
    with small_run(root, keep(2)) as run:
        run.step(2)
        run.saver.save(2)
    assert names(root) == ["step_00000001", "step_00000002"]
    replaced = next(there for name, there in seen if name == "step_00000002.old.tmp")
    assert "step_00000002" in replaced


def test_a_checkpoint_that_cannot_be_replaced_stays(checkpoints, keep, monkeypatch):
    """It may be the only whole one."""
    root, replace_file = checkpoints, os.replace

    def refuses(source, target):
        if str(source).endswith("step_00000002.tmp"):
            raise OSError(5, "Input/output error")
        replace_file(source, target)

    monkeypatch.setattr(folders.os, "replace", refuses)
    with small_run(root, keep(2)) as run:
        run.step(2)
        with pytest.raises(CheckpointError, match="could not be written .*Input/output error"):
            run.saver.save(2)
    assert names(root) == ["step_00000001", "step_00000002"]
    with single_process():
        assert choose_checkpoint(root)[0] == root / "step_00000002"


def test_a_deletion_that_is_interrupted_leaves_no_half_checkpoint(checkpoints, keep, monkeypatch):
    """Under a name that the next save clears away."""
    root = checkpoints

    def fails(path):
        (path / "dattn.json").unlink()
        raise OSError("interrupted")

    with small_run(root, keep(1)) as run:
        run.step(3)
        with monkeypatch.context() as patch:
            patch.setattr(folders.shutil, "rmtree", fails)
            run.saver.save(3)
        assert list_checkpoints(root)[0].name == "step_00000003"
        assert all((path / "dattn.json").is_file() for path in list_checkpoints(root))
        run.step(4)
        run.saver.save(4)
    assert names(root) == ["step_00000004"]
