"""All that watches a run and keeps what it makes, in one run, in each layout.

Held-out loss, scores that training waits for, exports, checkpoints that are written beside it, the
best one, the running mean of the weights, a schedule with a decay of its own, losses by source and
ratios of updates. The run equals that of one process. Stopped on the way it goes on bit for bit;
that scores and exports are made good then, which is rank 0's affair, `test_scores_of_checkpoints`
and `test_exports` hold.
"""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from dattn_mcore.config.load import merge
from tests.distributed.interrupted_jobs import train_until_killed
from tests.distributed.jobs import read_metrics, run_training
from tests.distributed.small_models import small_config
from tools.checkpoint_convert.dist_checkpoint import DistCheckpoint

STEPS, STOP = 4, 3
LAYOUTS = {
    "one": (1, {}),
    "tp2-sp": (2, {"tp": 2, "sp": True}),
    "pp2": (2, {"pp": 2}),
    "cp2": (2, {"cp": 2}),
    "dp2": (2, {"overlap_param_gather": True, "overlap_grad_reduce": True}),
    "tp2-pp2-sp": (4, {"tp": 2, "pp": 2, "sp": True}),
}
MEASURED = ("loss", "lr", "grad_norm", "update_ratio", "token_share")


def tree_for(digits, run_dir, parallel):
    return small_config(
        digits,
        run_dir,
        parallel=parallel,
        train={"steps": STEPS, "ema_decay": 0.9},
        optim={"schedule": "wsd", "warmup_steps": 1, "warmup_ratio": None, "decay_steps": 2},
        log={"update_ratio": True},
        validation={"share": 0.2, "interval": 2, "samples": 12},
        checkpoint={
            "save_interval": STEPS,
            "asynchronous": True,
            "keep": 1,
            "keep_best": 1,
            "best_by": "validation/loss",
        },
    )


def reported(digits):
    """Settings of a run that also answers questions and exports what it keeps."""
    return {
        "checkpoint": {"also_export": True},
        "scores": {
            "questions": str(digits / "heldout_questions.jsonl"),
            "image_folder": str(digits / "images"),
            "samples": 4,
            "max_new_tokens": 2,
            "wait": True,
            "device": "cpu",
        },
    }


@pytest.fixture(scope="module")
def whole(pool, digits, tmp_path_factory):
    """Makes the run of a layout once."""
    made = {}

    def run(name):
        if name not in made:
            ranks, parallel = LAYOUTS[name]
            made[name] = tmp_path_factory.mktemp(name)
            tree = merge(tree_for(digits, made[name], parallel), reported(digits))
            assert all(pool.run(run_training, ranks, tree, timeout=300))
        return made[name]

    return run


def measured(run_dir, name="metrics"):
    """Rows without times and rates."""
    return [
        {key: value for key, value in row.items() if key == "step" or key.startswith(MEASURED)}
        for row in read_metrics(run_dir, name)
    ]


def answers(run_dir):
    path = Path(run_dir) / f"scores/step_{STEPS:08d}/answers.jsonl"
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def folders(run_dir):
    return {
        kind: sorted(path.name for path in (run_dir / kind).iterdir())
        for kind in ("checkpoints", "exports")
    }


def saved(run_dir, ema):
    source = DistCheckpoint(run_dir / f"checkpoints/step_{STEPS:08d}", ema=ema)
    return {key: source.read_exact(key) for key in source.shapes}


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "one"])
def test_equal_to_one_process(whole, name):
    want, found = whole("one"), whole(name)
    for rows in ("metrics", "validation"):
        for ours, theirs in zip(measured(found, rows), measured(want, rows), strict=True):
            assert ours == pytest.approx(theirs, rel=2e-4)
    assert read_metrics(found, "scores") == read_metrics(want, "scores")
    assert answers(found) == answers(want)
    assert folders(found) == folders(want)
    last = f"exports/step_{STEPS:08d}/model.safetensors"
    ours, theirs = load_file(found / last), load_file(want / last)
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():  # Adam divides gradients near 0 by themselves
        assert float((ours[key] - value).abs().max()) < 5e-4, key
    ours = saved(found, ema=True)
    for key, value in saved(want, ema=True).items():
        assert float((ours[key] - value).abs().max()) < 5e-4, key


@pytest.mark.parametrize("name", LAYOUTS)
def test_stopped_and_resumed_is_bitwise_the_same(pool, digits, whole, tmp_path, name):
    ranks, parallel = LAYOUTS[name]
    want, tree = whole(name), tree_for(digits, tmp_path, parallel)
    assert not any(pool.run(train_until_killed, ranks, tree, STOP, timeout=300))
    assert all(pool.run(run_training, ranks, tree, timeout=300))
    for rows in ("metrics", "validation"):
        assert measured(tmp_path, rows) == measured(want, rows)
    for ema in (False, True):
        ours = saved(tmp_path, ema)
        assert all(bool((ours[key] == value).all()) for key, value in saved(want, ema).items())
