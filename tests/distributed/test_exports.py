"""Exports beside training, by the converter itself: whole, checked, and made up for on a resume."""

from pathlib import Path

from tests.distributed.interrupted_jobs import train_until_killed
from tests.distributed.jobs import run_training
from tests.distributed.small_models import small_config
from tools.checkpoint_convert.mcore_to_hf import convert


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_a_run_that_is_stopped_in_an_export_makes_it_when_it_goes_on(pool, digits, tmp_path):
    """Of the two checkpoints that stay; the files are those of the converter's own command."""
    run_dir = tmp_path / "run"
    checkpoint = {"save_interval": 1, "keep": 2, "also_export": True}
    tree = small_config(digits, run_dir, parallel={"pp": 2}, checkpoint=checkpoint)
    assert not any(pool.run(train_until_killed, 2, tree, 1))
    assert list((run_dir / "checkpoints").iterdir()) == [run_dir / "checkpoints/step_00000001"]
    exports = run_dir / "exports"
    assert not exports.exists() or list(exports.iterdir()) == []  # it removed what it had begun
    assert all(pool.run(run_training, 2, tree))
    names = ["step_00000002", "step_00000003"]
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == names
    assert sorted(path.name for path in exports.iterdir()) == names
    convert(run_dir / "checkpoints/step_00000002", tmp_path / "hf")
    assert files(exports / "step_00000002") == files(tmp_path / "hf")
