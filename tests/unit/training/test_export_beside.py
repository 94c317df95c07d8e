"""Exports beside training: which are made, and what is left of one that fails or is killed."""

import contextlib
import logging
import os
import shutil
import time
from dataclasses import replace

import pytest

from dattn_mcore.checkpoint.folders import damage
from dattn_mcore.checkpoint.manifest import MANIFEST, new_manifest, read_manifest, write_manifest
from dattn_mcore.config.schema import CheckpointConfig, Config
from dattn_mcore.parallel.groups import single_process
from dattn_mcore.training import export_beside
from dattn_mcore.training.export_beside import ExportBeside


class Phases:
    """Takes the watchdog's place."""

    def phase(self, *arguments):
        assert arguments == ("exporting checkpoints", 0, "")


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    """A run with checkpoints of steps 1 and 2, whose exports are made by `fake_export`."""
    monkeypatch.setattr(export_beside, "PROGRAM", "tests.unit.training.fake_export")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    for step in (1, 2):
        checkpoint(tmp_path, step)
    (tmp_path / "order").write_text("make")
    return tmp_path


def checkpoint(run_dir, step):
    """As far as its manifest says it is whole."""
    folder = run_dir / f"checkpoints/step_0000000{step}"
    folder.mkdir(parents=True)
    (folder / "shard").write_text("x")
    files = {"shard": [1, "0" * 64]}
    fields = new_manifest(Config(), step, {}, (1, 1), {}, "data", 9)
    write_manifest(folder, fields, files)
    assert damage(folder, ["shard"], read_manifest(folder)["files"], hashes=False) is None
    return folder


@contextlib.contextmanager
def exporting(run_dir):
    with single_process():
        yield ExportBeside(run_dir, Phases())


def exports(run_dir):
    return sorted(path.name for path in (run_dir / "exports").iterdir())


def wait_for(path):
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"{path} did not come")


def test_every_whole_checkpoint_is_exported_by_the_end(run_dir, caplog):
    """The newest first; one that is not whole is none, and a second run has nothing to do."""
    caplog.set_level(logging.INFO, "dattn_mcore")
    (checkpoint(run_dir, 3) / "shard").unlink()
    with exporting(run_dir) as hook:
        hook.saved(run_dir)
        hook.close(2, True)
    assert exports(run_dir) == ["step_00000001", "step_00000002"]
    for name in exports(run_dir):
        made_of = (run_dir / "exports" / name / "made_of").read_text()
        assert made_of == str(run_dir / "checkpoints" / name)
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"exported {run_dir}/exports/step_0000000{step}" for step in (2, 1)]
    (run_dir / "order").write_text("fail")
    with exporting(run_dir) as hook:
        hook.close(2, True)
    assert len(caplog.records) == 2


def test_a_failure_is_one_warning_and_tried_again_at_the_next_start(run_dir, caplog):
    shutil.rmtree(run_dir / "checkpoints/step_00000001")
    (run_dir / "order").write_text("fail")
    with exporting(run_dir) as hook:
        hook.saved(run_dir)
        hook.close(2, True)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == (
        f"warning: {run_dir}/checkpoints/step_00000002 was not exported: no space (status 2); "
        "training goes on, and the next start tries again"
    )
    assert exports(run_dir) == []
    (run_dir / "order").write_text("make")
    with exporting(run_dir) as hook:
        hook.close(2, True)
    assert exports(run_dir) == ["step_00000002"]


def test_a_stopped_run_ends_its_export_and_does_it_again(run_dir):
    """Killed so hard that the temporary folder stays, too."""
    (run_dir / "order").write_text("hang")
    with exporting(run_dir) as hook:
        hook.saved(run_dir)
        wait_for(run_dir / "hangs")
        hook.after_step(None)  # still running: nothing happens
        hook.close(2, False)
    pid = int((run_dir / "hangs").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert exports(run_dir) == [f".step_00000002.{pid}.tmp"]
    (run_dir / "order").write_text("make")
    with exporting(run_dir) as hook:
        assert exports(run_dir) == []
        hook.close(2, True)
    assert exports(run_dir) == ["step_00000001", "step_00000002"]


def test_an_export_whose_checkpoint_is_gone_goes_too(run_dir, caplog):
    """Without a word: it is no failure."""
    with exporting(run_dir) as hook:
        hook.saved(run_dir)
        wait_for(run_dir / "exports/step_00000002")
        shutil.rmtree(run_dir / "checkpoints")
        hook.close(2, True)
    assert exports(run_dir) == [] and not caplog.records


def test_a_run_without_a_checkpoint_has_nothing_to_export(tmp_path):
    with exporting(tmp_path) as hook:
        hook.after_step(None)
        hook.close(0, True)
    assert list(tmp_path.iterdir()) == []


def test_a_moved_manifest_is_no_checkpoint(run_dir):
    (run_dir / "checkpoints/step_00000001" / MANIFEST).unlink()
    with exporting(run_dir) as hook:
        hook.close(2, True)
    assert exports(run_dir) == ["step_00000002"]


def test_off_by_default():
    assert not replace(CheckpointConfig()).also_export
