"""A whole run that goes on with other optimizer settings: the rate of every step, and what is said."""

import pytest
import yaml

from tests.distributed.interrupted_jobs import train_until_killed
from tests.distributed.jobs import read_metrics, run_training, run_training_with_log
from tests.distributed.pool import WorkerError
from tests.distributed.small_models import small_config

FIRST = {"lr": 3e-3, "warmup_ratio": 0.0}
OTHER = {
    **{"lr": 1e-4, "min_lr_ratio": 0.5, "beta2": 0.5, "weight_decay": 0.1},
    **{"lr_projector": 2e-4, "warmup_ratio": 0.0},
}


def tree_for(digits, run_dir, optim, steps=6, **checkpoint):
    train = {"steps": steps, "global_batch_size": 12}
    return small_config(digits, run_dir, optim=optim, train=train, checkpoint=checkpoint)


def rates(run_dir):
    return [row["lr"] for row in read_metrics(run_dir)]


def recorded(run_dir):
    return yaml.safe_load((run_dir / "config.yaml").read_text())["optim"]


@pytest.fixture(scope="module")
def whole(pool, digits, tmp_path_factory):
    """Six steps with the first settings, never stopped."""
    run_dir = tmp_path_factory.mktemp("whole")
    pool.run(run_training, 1, tree_for(digits, run_dir, FIRST))
    return run_dir


def test_the_settings_given_now_hold(pool, digits, tmp_path):
    """The rate of every further step is that of a run that had them from the beginning."""
    other, run_dir = tmp_path / "other", tmp_path / "run"
    pool.run(run_training, 1, tree_for(digits, other, OTHER))
    pool.run(train_until_killed, 1, tree_for(digits, run_dir, FIRST), 3)
    ((done, log),) = pool.run(run_training_with_log, 1, tree_for(digits, run_dir, OTHER))
    assert done
    assert rates(run_dir)[3:] == rates(other)[3:]
    said = [line for line in log.splitlines() if line.startswith("optimizer settings differ")]
    assert len(said) == 1
    for change in ("lr 0.003 -> 0.0001", "beta2 0.95 -> 0.5", "lr_projector None -> 0.0002"):
        assert f"optim.{change}" in said[0]
    assert recorded(run_dir)["lr"] == 1e-4
    # Back again: the group of the projector goes.
    back = tree_for(digits, run_dir, FIRST, steps=7)
    assert all(pool.run(run_training, 1, back))
    assert len(rates(run_dir)) == 7


def test_the_checkpoints_settings_are_kept_on_demand(pool, digits, tmp_path, whole):
    """Bit for bit the run that was never stopped, and its settings are the ones recorded."""
    pool.run(train_until_killed, 1, tree_for(digits, tmp_path, FIRST), 3)
    kept = tree_for(digits, tmp_path, OTHER, keep_optimizer_settings=True)
    assert all(pool.run(run_training, 1, kept))
    for name in ("loss", "lr", "grad_norm"):
        here, there = ([row[name] for row in read_metrics(path)] for path in (tmp_path, whole))
        assert here == there, name
    assert recorded(tmp_path) == recorded(whole)


def test_more_steps_on_a_finished_run(pool, digits, tmp_path, whole):
    """The schedule is that of all steps from here on, which is said; a kept one has ended."""
    short = tree_for(digits, tmp_path, FIRST, steps=3)
    pool.run(run_training, 1, short)
    with pytest.raises(WorkerError, match="schedule ends at step 3 with a learning rate of 0"):
        pool.run(run_training, 1, tree_for(digits, tmp_path, FIRST, keep_optimizer_settings=True))
    ((done, log),) = pool.run(run_training_with_log, 1, tree_for(digits, tmp_path, FIRST))
    assert done and rates(tmp_path)[3:] == rates(whole)[3:]
    assert "steps of the learning rate's schedule 3 -> 6" in log
