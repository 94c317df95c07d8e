"""Every m-th checkpoint, the best ones, and exports that go with theirs."""

import json
import math
import shutil
from dataclasses import replace

import pytest

from dattn_mcore.checkpoint.folders import remove_old
from dattn_mcore.checkpoint.manifest import new_manifest, read_manifest
from dattn_mcore.checkpoint.retention import Retention
from dattn_mcore.config.schema import CheckpointConfig
from dattn_mcore.errors import CheckpointError
from tests.unit.checkpoint.runs import seal, small_run

LOSS = {1: 3.0, 2: 1.0, 3: 1.0, 4: 2.0, 5: 2.5, 6: 2.2}


def metrics(**missing):
    return {step: {"validation/loss": value} for step, value in LOSS.items()}


@pytest.mark.parametrize(
    ("rules", "stay"),
    [
        (Retention(newest=2), {5, 6}),
        (Retention(newest=1, every=2), {2, 4, 6}),
        (Retention(newest=9), {1, 2, 3, 4, 5, 6}),
        # Of equal ones the newer.
        (Retention(newest=1, best=1, best_by="validation/loss", smallest=True), {3, 6}),
        (Retention(newest=1, best=3, best_by="validation/loss", smallest=True), {2, 3, 4, 6}),
        (Retention(newest=1, best=2, best_by="validation/loss"), {1, 5, 6}),
        (Retention(newest=1, every=4, best=1, best_by="validation/loss"), {1, 4, 6}),
        (Retention(newest=1, best=2, best_by="scores/vqav2"), {6}),
    ],
)
def test_what_stays(rules, stay):
    assert rules.staying(metrics()) == stay


def test_a_checkpoint_without_the_metric_is_none_of_the_best():
    known = metrics() | {7: {}, 2: {"validation/perplexity": 0.1}}
    rules = Retention(newest=1, best=1, best_by="validation/loss", smallest=True)
    assert rules.staying(known) == {3, 7}


@pytest.mark.parametrize(
    ("name", "mode", "smallest"),
    [
        ("validation/loss", "auto", True),
        ("validation/loss/vqa", "auto", True),
        ("validation/source_loss", "auto", True),
        ("scores/vqav2", "auto", False),
        ("scores/glossary", "auto", False),
        ("scores/vqav2", "min", True),
        ("validation/loss", "max", False),
    ],
)
def test_which_value_is_best(name, mode, smallest):
    checkpoint = CheckpointConfig(keep=3, keep_best=2, best_by=name, best_mode=mode)
    assert Retention.of(checkpoint) == Retention(3, None, 2, name, smallest)


def test_the_best_stays_over_a_resume_and_a_move(small_configuration, tmp_path):
    """Read from the manifests: step 2 is best; exports go with their checkpoints, and no others."""
    rules = {"keep": 1, "keep_every": 4, "keep_best": 1, "best_by": "validation/loss"}
    config = replace(small_configuration, checkpoint=replace(CheckpointConfig(), **rules))
    run_dir = tmp_path / "run"
    with small_run(run_dir / "checkpoints", config) as run:
        for step in (1, 2, 3):
            run.step(step)
            run.saver.save(step, metrics={"validation/loss": LOSS[step] + (step == 3)})
            (run_dir / f"exports/step_0000000{step}").mkdir(parents=True)
        assert read_manifest(run_dir / "checkpoints/step_00000002")["metrics"] == {
            "validation/loss": 1.0
        }
    moved = shutil.move(run_dir, tmp_path / "moved")
    (moved / "exports/mine").mkdir()
    (moved / "exports/step_00000001.old.tmp").mkdir()  # of an interrupted deletion
    with small_run(moved / "checkpoints", config) as run:
        assert run.resume() == 3
        for step in (4, 5):
            run.saver.save(step, metrics={"validation/loss": math.nan})
    left = ["step_00000002", "step_00000004", "step_00000005"]
    assert sorted(path.name for path in (moved / "checkpoints").iterdir()) == left
    assert sorted(path.name for path in (moved / "exports").iterdir()) == ["mine", left[0]]
    assert "metrics" not in read_manifest(moved / "checkpoints/step_00000005")


def test_the_best_by_scores_is_the_one_that_has_them(small_configuration, tmp_path):
    """Scores come after later checkpoints; what is not scored yet waits for them."""
    config = replace(small_configuration, checkpoint=replace(CheckpointConfig(), keep=9))
    run_dir = tmp_path / "run"
    root, rules = run_dir / "checkpoints", Retention(newest=1, best=1, best_by="scores/pope")
    score = {1: 50.0, 2: 80.0, 3: None, 4: 60.0}  # the third's evaluation failed
    stay = {1: [1], 2: [1, 2], 3: [1, 2, 3], 4: [2, 3, 4], 5: [2, 4, 5]}
    with small_run(root, config) as run:
        for step, left in stay.items():
            saved = run.saver.save(step, metrics={"scores/pope": 99.0 - step})  # as once was said
            before = root / f"step_{step - 1:08d}"
            remove_old(root, rules, saved, [before, saved])
            assert sorted(int(path.name[-1]) for path in root.iterdir()) == left
            if step > 1:
                write_scores(run_dir, before.name, {"pope": score[step - 1]})


def write_scores(run_dir, name, values):
    folder = run_dir / "scores" / name
    folder.mkdir(parents=True)
    (folder / "scores.json").write_text(json.dumps({"values": values}))


def test_an_export_of_the_same_step_before_goes(small_configuration, tmp_path):
    """A run that went back and came again to this step has other weights."""
    stale = tmp_path / "run/exports/step_00000001"
    stale.mkdir(parents=True)
    with small_run(tmp_path / "run/checkpoints", small_configuration) as run:
        run.saver.save(1)
    assert not stale.exists()


@pytest.mark.parametrize("value", ["1.0", None, True, 3, {}, float("nan"), float("inf")])
def test_metrics_are_finite_numbers(checkpoints, value):
    folder = checkpoints / "step_00000002"
    fields = json.loads((folder / "dattn.json").read_text())
    assert "metrics" not in fields  # a manifest of before has none, and is read
    seal(folder, fields | {"metrics": {"validation/loss": 1.5}})
    assert read_manifest(folder)["metrics"] == {"validation/loss": 1.5}
    seal(folder, fields | {"metrics": {"validation/loss": value}})
    with pytest.raises(CheckpointError, match="metrics are no mapping of names to finite numbers"):
        read_manifest(folder)


def test_what_cannot_be_compared_is_not_written(small_configuration):
    said = {"a": 1, "b": math.nan, "c": math.inf}
    fields = new_manifest(small_configuration, 1, {}, metrics=said)
    assert fields["metrics"] == {"a": 1.0} and type(fields["metrics"]["a"]) is float
