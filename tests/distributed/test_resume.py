"""A run that was stopped and goes on equals one that was not: losses, samples, weights."""

import json
import math
import shutil
from pathlib import Path

import pytest

from dattn_mcore.checkpoint.folders import damage
from dattn_mcore.checkpoint.manifest import read_manifest
from tests.distributed.disk_jobs import train_on_a_full_disk
from tests.distributed.interrupted_jobs import (
    adam_steps_after_resume,
    saves_until_killed,
    train_until_killed,
    train_with_a_dead_first_step,
)
from tests.distributed.jobs import read_metrics, run_training, run_training_with_log
from tests.distributed.pool import WorkerError
from tests.distributed.small_models import small_config
from tests.distributed.watched_jobs import weights_by_step

STEPS = {"train": {"steps": 6, "global_batch_size": 12}}


def tree_for(digits, run_dir, **sections):
    return small_config(digits, run_dir, **{**STEPS, **sections})


def sample_ids(run_dir):
    lines = (Path(run_dir) / "samples.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(pool, digits, tmp_path_factory):
    """Losses of six steps in one process, never stopped."""
    run_dir = tmp_path_factory.mktemp("whole")
    pool.run(run_training, 1, tree_for(digits, run_dir))
    return run_dir


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [
        (1, {}),
        (2, {"tp": 2, "sp": True}),
        (2, {"pp": 2}),
        (2, {}),
        (4, {"pp": 2}),
        (2, {"cp": 2}),
        (4, {"cp": 2}),
    ],
    ids=["one", "tp2-sp", "pp2", "dp2", "pp2-dp2", "cp2", "cp2-dp2"],
)
def test_stopped_and_resumed_is_bitwise_the_same(pool, digits, tmp_path, world_size, parallel):
    """At the same layout, to the last bit; the signal reaches one rank only, in step 3."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pool.run(run_training, world_size, tree_for(digits, whole, parallel=parallel))
    tree = tree_for(digits, parts, parallel=parallel)
    assert pool.run(train_until_killed, world_size, tree, 3) == [False] * world_size
    assert [row["step"] for row in read_metrics(parts)] == [1, 2, 3]
    assert [p.name for p in (parts / "checkpoints").iterdir()] == ["step_00000003"]
    assert not (parts / "finished.json").exists()
    assert all(pool.run(run_training, world_size, tree))
    assert json.loads((parts / "finished.json").read_text()) == {"step": 6}
    for row, want in zip(read_metrics(parts), read_metrics(whole), strict=True):
        assert (row["loss"], row["grad_norm"], row["lr"]) == (
            want["loss"],
            want["grad_norm"],
            want["lr"],
        )
    assert sample_ids(parts) == sample_ids(whole)


@pytest.mark.parametrize(("world_size", "parallel"), [(1, {}), (2, {"tp": 2})], ids=["one", "tp2"])
def test_saved_while_training_goes_on(pool, digits, tmp_path, uninterrupted, world_size, parallel):
    """Each checkpoint holds the weights of its step, not of those that followed."""
    checkpoint = {"asynchronous": True, "save_interval": 2, "keep": 5}
    tree = tree_for(digits, tmp_path, parallel=parallel, checkpoint=checkpoint)
    assert all(pool.run(run_training, world_size, tree))
    saved = sorted((tmp_path / "checkpoints").iterdir())
    assert [p.name for p in saved] == ["step_00000002", "step_00000004", "step_00000006"]
    for folder in saved:
        files = read_manifest(folder)["files"]
        assert damage(folder, sorted(files), files) is None
    for folder in saved[1:]:
        shutil.rmtree(folder)
    assert all(pool.run(run_training, world_size, tree))
    rows, expected = read_metrics(tmp_path), read_metrics(uninterrupted)
    # tp 2 adds in another order
    exact = 0 if world_size == 1 else 1e-5
    for row, want in zip(rows, expected, strict=True):
        assert abs(row["loss"] - want["loss"]) <= exact


def test_every_step_learns_and_the_rate_is_the_one_that_was_used(pool, digits, tmp_path):
    """The first step, the peak and the last step of a run whose minimum is 0."""
    optim = {"lr": 4e-3, "warmup_ratio": 0.5, "lr_projector": 1e-3, "lr_vision": 4e-3}
    tree = small_config(digits, tmp_path, optim=optim, train={"steps": 4})
    (weights,) = pool.run(weights_by_step, 1, tree)
    for before, after in zip(weights[:-1], weights[1:], strict=True):
        assert any(not before[name].equal(after[name]) for name in before)
    rows = read_metrics(tmp_path)
    shape = [0.5, 1.0, 0.75, 0.25]  # the cosine of 0, 1/3 and 2/3 of a half turn
    assert [row["lr"] for row in rows] == pytest.approx([4e-3 * x for x in shape])
    assert [row["lr_projector"] for row in rows] == pytest.approx([1e-3 * x for x in shape])
    assert not any("lr_vision" in row for row in rows)


def test_a_checkpoint_of_the_older_schedule_goes_on_in_todays(pool, digits, tmp_path):
    """It was saved with the rate that its next step would have had then: 3e-3 at the peak."""
    tree = tree_for(digits, tmp_path, optim={"warmup_ratio": 0.5})
    pool.run(train_with_a_dead_first_step, 1, tree, 3)
    first = read_metrics(tmp_path)
    assert [row["lr"] for row in first] == pytest.approx([0, 1e-3, 2e-3])
    assert all(pool.run(run_training, 1, tree))
    rows = read_metrics(tmp_path)
    assert rows[:3] == first
    # Of 6 steps 3 warm up; step 7 would have the minimum.
    expected = [3e-3 * (1 + math.cos(math.pi * i / 4)) / 2 for i in (1, 2, 3)]
    assert [row["lr"] for row in rows[3:]] == pytest.approx(expected)


def test_killed_without_warning(pool, digits, tmp_path, uninterrupted):
    """Steps after the last save are done again, and leave one line each in the reports."""
    tree = tree_for(digits, tmp_path, checkpoint={"save_interval": 2})
    pool.run(train_until_killed, 1, tree, 5)
    shutil.rmtree(tmp_path / "checkpoints/step_00000005")  # as if killed before the save
    assert all(pool.run(run_training, 1, tree))
    rows, expected = read_metrics(tmp_path), read_metrics(uninterrupted)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in rows] == [row["loss"] for row in expected]
    assert sample_ids(tmp_path) == sample_ids(uninterrupted)


def test_a_signal_in_the_step_of_a_regular_save_saves_once(pool, digits, tmp_path):
    """A large checkpoint takes minutes, and a stopped job has few."""
    tree = tree_for(digits, tmp_path, checkpoint={"save_interval": 2})
    assert pool.run(saves_until_killed, 1, tree, 4) == [[2, 4]]


def test_a_finished_run_that_gets_more_steps_is_not_finished(pool, digits, tmp_path):
    tree = tree_for(digits, tmp_path, train={**STEPS["train"], "steps": 1})
    pool.run(run_training, 1, tree)
    assert (tmp_path / "finished.json").exists()
    tree["train"]["steps"] = 4
    pool.run(train_until_killed, 1, tree, 2)
    assert not (tmp_path / "finished.json").exists()


RESHARDED = {
    "tp2-pp2, pp2, one": [(4, {"tp": 2, "pp": 2}, 2), (2, {"pp": 2}, 2), (1, {}, 0)],
    "cp2, one, cp4": [(2, {"cp": 2}, 2), (1, {}, 2), (4, {"cp": 4}, 0)],
    "cp4, cp2-pp2, dp2": [(4, {"cp": 4}, 2), (4, {"cp": 2, "pp": 2}, 2), (2, {}, 0)],
    "dp2, cp2-dp2, cp2-tp2-sp": [
        (2, {}, 2),
        (4, {"cp": 2}, 2),
        (4, {"cp": 2, "tp": 2, "sp": True}, 0),
    ],
}


@pytest.mark.parametrize("name", RESHARDED)
def test_resharded_twice(pool, digits, tmp_path, uninterrupted, name):
    """Within 1e-6 of one process throughout."""
    layouts = RESHARDED[name]
    for world_size, parallel, steps in layouts:
        tree = tree_for(digits, tmp_path, parallel=parallel)
        if steps:
            pool.run(train_until_killed, world_size, tree, steps)
        else:
            assert all(pool.run(run_training, world_size, tree))
    rows, expected = read_metrics(tmp_path), read_metrics(uninterrupted)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row, want in zip(rows, expected, strict=True):
        assert row["loss"] == pytest.approx(want["loss"], abs=1e-6)


def test_frozen_last_stage_resumes(pool, digits, tmp_path):
    """A rank without trainable parameters has no optimizer state to save or load."""
    sections = {
        "parallel": {"pp": 2},
        "train": {"steps": 4, "global_batch_size": 12, "trains": ["projector"]},
    }
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pool.run(run_training, 2, tree_for(digits, whole, **sections))
    tree = tree_for(digits, parts, **sections)
    pool.run(train_until_killed, 2, tree, 2)
    pool.run(run_training, 2, tree)
    assert [r["loss"] for r in read_metrics(parts)] == [r["loss"] for r in read_metrics(whole)]


def test_learning_rate_per_part_survives_a_resume(pool, digits, tmp_path):
    """Megatron-Core tells parameter groups apart by multipliers only."""
    sections = {"optim": {"lr": 3e-3, "lr_vision": 1e-4, "lr_projector": 5e-3, "warmup_ratio": 0.0}}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pool.run(run_training, 1, tree_for(digits, whole, **sections))
    tree = tree_for(digits, parts, **sections)
    pool.run(train_until_killed, 1, tree, 3)
    pool.run(run_training, 1, tree)
    assert [r["loss"] for r in read_metrics(parts)] == [r["loss"] for r in read_metrics(whole)]


@pytest.fixture
def two_checkpoints(pool, digits, tmp_path):
    """A run with whole checkpoints at steps 2 and 4 of 6."""
    tree = tree_for(digits, tmp_path, checkpoint={"save_interval": 2, "keep": 5})
    pool.run(train_until_killed, 1, tree, 4)
    return tree, tmp_path


@pytest.mark.parametrize("damage", ["truncated", "missing", "flipped", "manifest", "empty-common"])
def test_damaged_checkpoint_falls_back_loudly(pool, two_checkpoints, uninterrupted, damage):
    tree, run_dir = two_checkpoints
    newest = run_dir / "checkpoints/step_00000004"
    shard = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    if damage == "truncated":
        shard.write_bytes(content[: len(content) // 2])
    elif damage == "missing":
        shard.unlink()
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    elif damage == "manifest":
        (newest / "dattn.json").write_text("{")
    else:
        (newest / "common.pt").write_bytes(b"")
    # A save that was killed on its way is never chosen, and is cleared away by the next save.
    (run_dir / "checkpoints/step_00000005.tmp").mkdir()
    ((done, log),) = pool.run(run_training_with_log, 1, tree)
    assert done
    assert f"{newest} cannot be read" in log
    assert [r["loss"] for r in read_metrics(run_dir)] == [
        r["loss"] for r in read_metrics(uninterrupted)
    ]
    assert not list((run_dir / "checkpoints").glob("*.tmp"))


def test_killed_during_the_first_save_starts_anew(pool, digits, tmp_path, uninterrupted):
    """Nothing whole was ever saved: the run begins with fresh weights, not with none."""
    (tmp_path / "checkpoints/step_00000002.tmp").mkdir(parents=True)
    assert all(pool.run(run_training, 1, tree_for(digits, tmp_path)))
    rows, expected = read_metrics(tmp_path), read_metrics(uninterrupted)
    assert [row["loss"] for row in rows] == [row["loss"] for row in expected]


def test_all_damaged_is_an_error(pool, two_checkpoints):
    tree, run_dir = two_checkpoints
    for manifest in run_dir.glob("checkpoints/*/dattn.json"):
        manifest.unlink()
    with pytest.raises(WorkerError, match="CheckpointError: no checkpoint in .* is readable"):
        pool.run(run_training, 1, tree)


def test_another_model_is_refused(pool, digits, two_checkpoints, tmp_path_factory):
    tree, run_dir = two_checkpoints
    other = {**tree, "model": {**tree["model"], "projector": {"ffn_hidden_size": 64}}}
    with pytest.raises(WorkerError, match="another model: model.projector.ffn_hidden_size is 48"):
        pool.run(run_training, 1, other)
    other["log"] = {**tree["log"], "run_dir": str(tmp_path_factory.mktemp("other"))}
    other["checkpoint"] = {"init_from": str(run_dir)}
    with pytest.raises(WorkerError, match="another model"):
        pool.run(run_training, 1, other)


def test_changed_data_is_refused(pool, digits, two_checkpoints):
    tree, _ = two_checkpoints
    other = {**tree, "data": {**tree["data"], "annotations": str(digits / "pretrain.json")}}
    message = r"trained on other data \(the annotations \(\d+ samples there, \d+ here\)\), so"
    with pytest.raises(WorkerError, match=message):
        pool.run(run_training, 1, other)
    other["data"] = {**tree["data"], "template": "gemma"}
    with pytest.raises(WorkerError, match=r"trained on other data \(data.template\), so"):
        pool.run(run_training, 1, other)


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [("train", "seed", 77), ("train", "global_batch_size", 6), ("data", "step_packs_multiple", 1)],
)
def test_another_order_of_samples_is_refused(pool, digits, two_checkpoints, section, name, value):
    tree, _ = two_checkpoints
    other = {**tree, section: {**tree[section], name: value}}
    message = f"trained with {section}.{name}=.*would mean other samples"
    with pytest.raises(WorkerError, match=message):
        pool.run(run_training, 1, other)


def test_other_tiles_are_refused_where_steps_depend_on_them(pool, digits, tmp_path):
    """With full packs, the rows of a sample say where a step ends."""
    data = {"step_packs_multiple": 2, "image_policy": "anyres_stretch"}
    data["anyres_grids"] = [[1, 2], [2, 1]]
    data["visual_budget"] = 160
    tree = tree_for(digits, tmp_path, data=data)
    pool.run(train_until_killed, 1, tree, 1)
    tree["data"]["anyres_grids"] = [[2, 1]]
    message = (
        r"trained with data.anyres_grids=\[\[1,2\],\[2,1\]\], here it is data.anyres_grids=\[\["
    )
    with pytest.raises(WorkerError, match=message):
        pool.run(run_training, 1, tree)


def test_init_from_takes_weights_only(pool, digits, two_checkpoints, tmp_path_factory):
    """A new stage starts at step 0 with the weights of another run."""
    tree, run_dir = two_checkpoints
    new = tmp_path_factory.mktemp("new")
    other = {**tree, "log": {**tree["log"], "run_dir": str(new)}}
    other["checkpoint"] = {"init_from": str(run_dir)}
    pool.run(run_training, 1, other)
    first = read_metrics(new)[0]
    assert first["step"] == 1
    assert first["loss"] < read_metrics(run_dir)[0]["loss"] - 0.2  # it has learnt already


def test_a_damaged_init_from_is_an_error(pool, two_checkpoints, tmp_path_factory):
    """Another stage does not start from an older checkpoint unasked."""
    tree, run_dir = two_checkpoints
    newest = run_dir / "checkpoints/step_00000004"
    (newest / "common.pt").write_bytes(b"")
    other = {**tree, "log": {**tree["log"], "run_dir": str(tmp_path_factory.mktemp("new"))}}
    other["checkpoint"] = {"init_from": str(run_dir)}
    message = f"{newest} cannot be read: .*name an older one .step_00000002."
    with pytest.raises(WorkerError, match=message):
        pool.run(run_training, 1, other)


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_full_disk_of_one_rank_ends_all(pool, digits, tmp_path, rank, asynchronous):
    """With the same line; nobody waits for a rank that could not write."""
    checkpoint = {"save_interval": 1, "asynchronous": asynchronous}
    tree = tree_for(digits, tmp_path, checkpoint=checkpoint)
    said, again = pool.run(train_on_a_full_disk, 2, tree, rank, 100_000)
    assert said == again
    assert "could not be written (" in said and "File too large" in said
    assert not list((tmp_path / "checkpoints").iterdir())


def test_a_disk_too_full_for_reports_ends_all(pool, digits, tmp_path):
    """The rank that writes them does not leave the others waiting."""
    said, again = pool.run(train_on_a_full_disk, 2, tree_for(digits, tmp_path), 0, 600, "step")
    assert said == again
    assert f"log.run_dir={tmp_path}: reports cannot be written there (File too large)" in said


def test_optimizer_steps_are_counted_once(pool, digits, two_checkpoints):
    """After a resume each parameter has a step counter of its own (see parallel/torch_adam.py)."""
    tree, _ = two_checkpoints
    (steps,) = pool.run(adam_steps_after_resume, 1, tree)
    assert set(steps) == {5.0}
    assert len(steps) > 10
