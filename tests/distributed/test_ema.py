"""The running mean of the weights is the plain recurrence over exported weights, in every layout."""

import functools
import shutil
from pathlib import Path

import pytest
import torch

from dattn_mcore.config.load import merge
from tests.distributed.interrupted_jobs import train_until_killed
from tests.distributed.jobs import run_training, run_training_with_log
from tests.distributed.small_models import GEMMA, small_config
from tests.pairwise import pairwise
from tools.checkpoint_convert.average import AverageOptions, average
from tools.checkpoint_convert.dist_checkpoint import DistCheckpoint
from tools.checkpoint_convert.raw_folders import same_bits

DECAY = 0.7
EMBEDDING = "embedding.word_embeddings.weight"
FACTORS = {
    "tensor": {"tp1": {}, "tp2-sp": {"parallel": {"tp": 2, "sp": True}}},
    "pipeline": {
        "pp1": {},
        "pp2": {"parallel": {"pp": 2}},
        "pp2-vpp2": {"parallel": {"pp": 2, "vpp": 2}},
    },
    "data": {"dp1": {}, "dp2": {}},
    "overlap": {
        "no-overlap": {},
        "overlap-both": {"parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True}},
    },
    "trains": {"all": {}, "frozen-tower": {"train": {"trains": ["projector", "llm"]}}},
    "family": {"mistral": {}, "tied": {"model": GEMMA}},
    "precision": {"fp32": {}, "bf16": {"train": {"precision": "bf16"}}},
    "saves": {"at-once": {}, "async": {"checkpoint": {"asynchronous": True}}},
}
ALONE = frozenset({frozenset({("overlap", "overlap-both"), ("data", "dp1")})})
CASES = pairwise(
    {name: tuple(values) for name, values in FACTORS.items()},
    ALONE,
    [
        {"tensor": "tp2-sp", "pipeline": "pp2", "data": "dp1", "family": "tied"},
        {"data": "dp2", "overlap": "overlap-both", "tensor": "tp1", "pipeline": "pp1"},
        # Its last stage has nothing that learns.
        {"pipeline": "pp2", "tensor": "tp1", "data": "dp1", "trains": "all"},
    ],
)
PROJECTOR_ALONE = {"parallel": {"pp": 2}, "train": {"trains": ["projector"]}}


def tree_for(digits, run_dir, *sections, steps=5, **train):
    tree = small_config(
        digits,
        run_dir,
        train={"steps": steps, "ema_decay": DECAY, **train},
        checkpoint={"save_interval": 1, "keep": 9},
    )
    return functools.reduce(merge, sections, tree)


def checkpoint(run_dir, step, ema=False):
    return DistCheckpoint(Path(run_dir) / f"checkpoints/step_0000000{step}", ema=ema)


def weights(source):
    return {key: source.read_exact(key).double() for key in source.shapes}


def follow(mean, source):
    """One step of the recurrence, in float64 over what was saved."""
    return {key: DECAY * mean[key] + (1 - DECAY) * w for key, w in weights(source).items()}


def assert_is_mean(source, want, learns=lambda key: True):
    """Float32 rounds twice a step: 1.2e-7 of the largest value, less than five times."""
    for key, value in want.items():
        if learns(key):
            found = source.read_exact(key)
            assert found.dtype == torch.float32
            bound = 6e-7 * float(value.abs().max()) + 1e-12
            assert float((found.double() - value).abs().max()) <= bound, key


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(case.values()))
def test_it_is_the_plain_recurrence(pool, digits, tmp_path, case):
    sections = [FACTORS[name][value] for name, value in case.items()]
    ranks = 2 ** sum(case[name] != next(iter(FACTORS[name])) for name in list(FACTORS)[:3])
    assert all(pool.run(run_training, ranks, tree_for(digits, tmp_path, *sections, ema_start=1)))
    frozen = case["trains"] == "frozen-tower"

    def learns(key):
        return not (frozen and key.startswith("vision."))

    means = {key[4:] for key in checkpoint(tmp_path, 5).ignored if key.startswith("ema.")}
    assert means == {key for key in checkpoint(tmp_path, 5).shapes if learns(key)}
    want = weights(checkpoint(tmp_path, 1))
    for step in range(1, 6):
        if step > 1:
            want = follow(want, checkpoint(tmp_path, step))
        assert_is_mean(checkpoint(tmp_path, step, ema=True), want, learns)
    average([tmp_path], tmp_path / "mean", AverageOptions(last=3, dtype="float32"))
    found = DistCheckpoint(tmp_path / "mean")
    for key, value in weights(found).items():  # of three, rounded to float32
        plain = sum(weights(checkpoint(tmp_path, step))[key] for step in (3, 4, 5)) / 3
        assert float((value - plain).abs().max()) <= 1.2e-7 * float(plain.abs().max()), key
    last = checkpoint(tmp_path, 5).read(EMBEDDING).double()
    assert float((last - want[EMBEDDING]).abs().max()) > 1e-3


def test_a_stage_may_have_nothing_that_learns(pool, digits, tmp_path):
    """And a mean from the first step on begins with the weights that the run was given."""
    first = tmp_path / "first"
    assert all(pool.run(run_training, 1, tree_for(digits, first, steps=1, ema_decay=None)))
    start = {"checkpoint": {"init_from": str(first)}}
    tree = tree_for(digits, tmp_path / "run", PROJECTOR_ALONE, start, steps=2)
    assert all(pool.run(run_training, 2, tree))
    want = weights(checkpoint(first, 1))
    for step in (1, 2):
        want = follow(want, checkpoint(tmp_path / "run", step))
    ema = checkpoint(tmp_path / "run", 2, ema=True)
    assert_is_mean(ema, want, lambda key: key.startswith("projector."))
    for key in ema.shapes:  # what is frozen is its own mean
        if not key.startswith("projector."):
            assert same_bits(ema.read(key), checkpoint(first, 1).read(key)), key


TP2, PP2 = {"parallel": {"tp": 2, "sp": True}}, {"parallel": {"pp": 2}}
CP2 = {"parallel": {"cp": 2}}


@pytest.mark.parametrize(
    ("layout", "ranks"),
    [({}, 1), (TP2, 2), (PP2, 2), ({}, 2), (CP2, 2)],
    ids=["one", "tp2-sp", "pp2", "dp2", "cp2"],
)
def test_resumed_in_the_same_layout_is_bitwise_the_same(pool, digits, tmp_path, layout, ranks):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert all(pool.run(run_training, ranks, tree_for(digits, whole, layout, steps=4)))
    tree = tree_for(digits, parts, layout, steps=4)
    assert not any(pool.run(train_until_killed, ranks, tree, 2))
    assert all(pool.run(run_training, ranks, tree))
    one, other = checkpoint(whole, 4, ema=True), checkpoint(parts, 4, ema=True)
    for key in one.shapes:
        assert same_bits(one.read_exact(key), other.read_exact(key)), key


@pytest.mark.parametrize(
    ("before", "after"),
    [((TP2, 2), (PP2, 2)), (({}, 2), (TP2, 2)), ((PP2, 2), ({}, 1)), ((CP2, 2), (PP2, 2))],
    ids=["tp2-pp2", "dp2-tp2", "pp2-one", "cp2-pp2"],
)
def test_resumed_in_another_layout(pool, digits, tmp_path, before, after):
    """The mean that was saved goes on as it was: the step after it follows from it."""
    tree = tree_for(digits, tmp_path, before[0], steps=4)
    assert not any(pool.run(train_until_killed, before[1], tree, 2))
    saved = weights(checkpoint(tmp_path, 2, ema=True))
    tree = tree_for(digits, tmp_path, after[0], steps=4)
    assert all(pool.run(run_training, after[1], tree))
    resumed, want = checkpoint(tmp_path, 3, ema=True), follow(saved, checkpoint(tmp_path, 3))
    for key, value in want.items():
        found = resumed.read_exact(key).double()
        # One step of float32: as its last bit, of values up to 1.
        bound = 1e-7 * max(1.0, float(value.abs().max()))
        assert float((found - value).abs().max()) <= bound, key


def test_a_run_begins_and_ends_a_mean_with_one_line(pool, digits, tmp_path):
    """Between two parts of a run: its checkpoint has none yet, or one that is not asked for."""
    tree = tree_for(digits, tmp_path, steps=4)
    without = merge(tree, {"train": {"ema_decay": None}})
    assert not any(pool.run(train_until_killed, 1, without, 1))
    ((_, said),) = pool.run(run_training_with_log, 1, tree)
    assert said.count("running mean") == 1
    assert (
        "step_00000001 has no running mean of the weights (train.ema_decay): it starts from the "
        "weights of step 1"
    ) in said
    want = follow(weights(checkpoint(tmp_path, 1)), checkpoint(tmp_path, 2))
    assert_is_mean(checkpoint(tmp_path, 2, ema=True), want)
    for step in (3, 4):
        shutil.rmtree(tmp_path / f"checkpoints/step_0000000{step}")
    ((_, said),) = pool.run(run_training_with_log, 1, without)
    assert said.count("running mean") == 1
    assert "in step_00000002 ends here (train.ema_decay is null)" in said
    assert not any(key.startswith("ema.") for key in checkpoint(tmp_path, 4).ignored)
