"""A run whose folder is taken away says so, saves what it knows, and ends."""

import pytest

from tests.distributed.disk_jobs import train_without_folder
from tests.distributed.jobs import read_metrics, run_training
from tests.distributed.small_models import small_config


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("how", "world_size", "asynchronous"),
    [("deleted", 2, False), ("deleted", 1, True), ("moved", 1, False)],
)
def test_it_saves_anew_and_ends(pool, digits, tmp_path, how, world_size, asynchronous):
    """In the step after a regular save, whose checkpoint is gone with the rest."""
    run_dir = tmp_path / "run"
    checkpoint = {"save_interval": 2, "asynchronous": asynchronous}
    train = {"steps": 6, "global_batch_size": 12}
    tree = small_config(digits, run_dir, train=train, checkpoint=checkpoint)
    said = pool.run(train_without_folder, world_size, tree, 3, how)
    assert len(set(said)) == 1
    assert said[0].startswith(
        f"log.run_dir={run_dir} was deleted or moved while the run wrote into it; its metrics, "
        "samples and settings are not there any more. A checkpoint of the last step was saved"
    )
    assert names(run_dir) == ["checkpoints"]
    assert names(run_dir / "checkpoints") == ["step_00000003"]
    assert (tmp_path / "elsewhere").exists() == (how == "moved")
    assert all(pool.run(run_training, world_size, tree))
    assert [row["step"] for row in read_metrics(run_dir)] == [4, 5, 6]


def test_what_was_saved_in_that_very_step_is_saved_again(pool, digits, tmp_path):
    """The folder goes in step 2, after which it saves: into a folder that it makes."""
    run_dir = tmp_path / "run"
    train = {"steps": 6, "global_batch_size": 12}
    tree = small_config(digits, run_dir, train=train, checkpoint={"save_interval": 2})
    (said,) = pool.run(train_without_folder, 1, tree, 2, "deleted")
    assert "was deleted or moved while the run wrote into it" in said
    assert names(run_dir / "checkpoints") == ["step_00000002"]


def test_another_runs_folder_is_not_written_into(pool, digits, tmp_path):
    run_dir = tmp_path / "run"
    tree = small_config(digits, run_dir, train={"steps": 6, "global_batch_size": 12})
    (said,) = pool.run(train_without_folder, 1, tree, 3, "replaced")
    assert "another folder is in its place, and nothing was saved there" in said
    assert names(run_dir) == [".lock"]
