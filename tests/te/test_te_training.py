"""Runs on Transformer Engine's layers and fused Adam: as on the local layers, and over a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dattn_mcore.config.load import merge
from tests.distributed.jobs import read_metrics, run_training
from tests.distributed.small_models import SMALL_MODEL, small_config
from tests.te import train_jobs

TE = {"train": {"transformer_impl": "transformer_engine"}}
PROJECTOR = {"train": {"trains": ["projector"]}}
# Each with its number of ranks. All but `frozen` learn the same as one process that has none.
SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (1, {}),
    "full recompute": (1, {"train": {"recompute": "full"}}),
    "selective recompute": (
        1,
        {"train": {"recompute": "selective", "recompute_modules": ["core_attn", "mlp"]}},
    ),
    "recomputed norms": (
        1,
        {"train": {"recompute": "selective", "recompute_modules": ["layernorm"]}},
    ),
    "visual chunks": (1, {"train": {"recompute_visual_chunk": 24}}),
    "tp2-sp": (2, {"parallel": {"tp": 2, "sp": True}}),
    "frozen": (1, PROJECTOR),
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2-sp full recompute": (
        2,
        {"parallel": {"tp": 2, "sp": True}, "train": {"recompute": "full"}},
    ),
    "pp2": (2, {"parallel": {"pp": 2}}),
    "dp2 overlap": (
        2,
        {"parallel": {"overlap_grad_reduce": True, "overlap_param_gather": True}},
    ),
}
# Blocks of 128 divide it.
FP8_MODEL = merge(SMALL_MODEL, {"llm": {"hidden_size": 128, "ffn_hidden_size": 128}})
FP8_MODEL["llm"] |= {"head_dim": 64}


def losses(run_dir: Path) -> list[tuple[float, float]]:
    return [(row["loss"], row["grad_norm"]) for row in read_metrics(run_dir)]


def check_same(run_dir: Path, wanted: list[tuple[float, float]]) -> None:
    """Three steps of a run in float32: losses and gradient norms."""
    found = losses(run_dir)
    assert len(found) == len(wanted) == 3
    for (loss, norm), (want, want_norm) in zip(found, wanted, strict=True):
        assert loss == pytest.approx(want, abs=1e-5)
        assert norm == pytest.approx(want_norm, rel=1e-4)


@pytest.fixture(scope="module")
def local(pool, digits, tmp_path_factory):
    """Losses and gradient norms of the local layers and PyTorch's Adam, by what learns."""
    found = {}
    for name, sections in (("all", {}), ("projector", PROJECTOR)):
        run_dir = tmp_path_factory.mktemp(name)
        assert all(pool.run(run_training, 1, small_config(digits, run_dir, **sections)))
        found[name] = losses(run_dir)
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_three_steps_are_those_of_the_local_layers(any_te, digits, tmp_path, local, name):
    """float32; gradients are added into `main_grad` by the products, over several micro-batches."""
    ranks, sections = SETTINGS[name]
    tree = small_config(digits, tmp_path, **merge(sections, TE))
    assert all(any_te.run(train_jobs.train, ranks, tree))
    check_same(tmp_path, local["projector" if name == "frozen" else "all"])


@pytest.mark.parametrize("name", LAYOUTS)
def test_three_steps_of_other_layouts(any_te, digits, tmp_path, local, name):
    ranks, sections = LAYOUTS[name]
    tree = small_config(digits, tmp_path, **merge(sections, TE))
    assert all(any_te.run(train_jobs.train, ranks, tree))
    check_same(tmp_path, local["all"])


@pytest.mark.parametrize("first", ["local", "transformer_engine"])
def test_a_checkpoint_of_one_spec_and_adam_goes_on_in_the_other(
    pool, te, digits, tmp_path, local, first
):
    """As when Transformer Engine is installed, or gone, between two parts of a run."""
    ours, theirs = small_config(digits, tmp_path), small_config(digits, tmp_path, **TE)
    if first == "local":
        assert pool.run(train_jobs.train, 1, ours, 2) == [False]
        assert te.run(train_jobs.train, 1, theirs) == [True]
    else:
        assert te.run(train_jobs.train, 1, theirs, 2) == [False]
        assert pool.run(train_jobs.train, 1, ours) == [True]
    for (loss, _), (want, _) in zip(losses(tmp_path), local["all"], strict=True):
        assert loss == pytest.approx(want, abs=1e-5)  # the two round differently


@pytest.mark.parametrize(
    ("recipe", "ranks", "parallel"),
    [
        ("delayed", 1, {}),
        ("delayed", 2, {"tp": 2, "sp": True}),
        ("delayed", 2, {}),
        ("delayed", 2, {"pp": 2}),
        ("tensorwise", 1, {}),
        ("blockwise", 1, {}),
    ],
    ids=["delayed", "delayed-tp2-sp", "delayed-dp2", "delayed-pp2", "tensorwise", "blockwise"],
)
def test_a_resumed_fp8_run_is_bitwise_the_same(te, digits, tmp_path, recipe, ranks, parallel):
    """Scales of delayed scaling are in the checkpoint; those of other recipes are made anew."""
    train = {**TE["train"], "precision": "bf16", "fp8": recipe}
    sections = {"model": FP8_MODEL, "train": train, "parallel": parallel}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert all(te.run(train_jobs.train, ranks, small_config(digits, whole, **sections)))
    tree = small_config(digits, parts, **sections)
    assert te.run(train_jobs.train, ranks, tree, 2) == [False] * ranks
    assert all(te.run(train_jobs.train, ranks, tree))
    assert losses(parts) == losses(whole)
    scales = train_jobs.saved_scales(parts / "checkpoints/step_00000003")
    linears = 5 * SMALL_MODEL["llm"]["num_layers"]
    # Scale and history, forward and backward, of each.
    assert len(scales) == (4 * linears if recipe == "delayed" else 0)


def test_a_checkpoint_without_scales_goes_on_in_delayed_scaling(te, digits, tmp_path):
    """bf16, then FP8: scales begin at 1. And back: they are left alone."""
    train = {**TE["train"], "precision": "bf16"}
    plain = small_config(digits, tmp_path, train=train)
    fp8 = small_config(digits, tmp_path, train={**train, "fp8": "delayed", "steps": 4})
    assert te.run(train_jobs.train, 1, plain, 1) == [False]
    ((done, log),) = te.run(train_jobs.train_with_log, 1, fp8, 2)
    assert not done and "holds no FP8 scales for this run; they begin at 1" in log
    plain["train"]["steps"] = 4
    ((done, log),) = te.run(train_jobs.train_with_log, 1, plain)
    assert done and "FP8 scales" not in log
    assert len(losses(tmp_path)) == 4
