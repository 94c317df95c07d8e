"""Samples that share images train as if each had its own: the model, and whole runs.

The model is compared in float64 with one that gives each sample a copy of its images, keeps every
row to the end and attends by the reference backend. Whole runs in float32 have the losses and
gradient norms of a run with `data.share_images=false`.
"""

import functools

import pytest
import torch

from dattn_mcore.config.load import merge
from dattn_mcore.types import NO_IMAGES
from tests.distributed.jobs import read_metrics, run_training_with_log, train_without_last_save
from tests.distributed.shared_images_jobs import losses_and_gradients
from tests.distributed.small_models import GEMMA, SMALL_MODEL, small_config

# Tiles of 16 rows. Unit 0: one image; 1: two images; 2: the first of them alone.
PLAIN_GRIDS = (((0, 0),), ((0, 0), (0, 0)), ((0, 0),))
CANVAS_GRIDS = (((2, 1),), ((0, 0), (1, 2)), ((0, 0),))
UNITS = (0, NO_IMAGES, 1, 0, 1, 2, 0, 2)


def layouts_of(grids):
    """Images first, text before and between images, and one text row only."""
    rows = [[16 * (1 + columns * lines) for columns, lines in unit] for unit in grids]
    (one,), (first, second), (alone,) = rows
    return (
        ((True, one), (False, 9)),
        ((False, 6),),
        ((False, 3), (True, first), (False, 5), (True, second), (False, 4)),
        ((False, 2), (True, one), (False, 7)),
        ((True, first + second), (False, 1)),
        ((True, alone), (False, 8)),
        ((False, 4), (True, one), (False, 5)),
        ((False, 1), (True, alone), (False, 3)),
    )


PLAIN = {"backend": "reference", "fold_visual_projection": False, "skip_last_visual_rows": False}
MODELS = {"mistral": {}, "gemma2": GEMMA}  # the latter with soft-caps and sliding windows
SETTINGS = {
    "reference": ({"backend": "reference"}, {}),
    "sdpa": ({}, {}),
    "sum": ({"merge": "sum"}, {"loss_chunk": 7}),
    "chunks": ({}, {"recompute_visual_chunk": 20}),
    "chunks-recomputed-sum": ({"merge": "sum"}, {"recompute_visual_chunk": 9, "recompute": "full"}),
    "recomputed": ({}, {"recompute": "full"}),
    "selective": ({}, {"recompute": "selective", "recompute_modules": ["core_attn", "mlp"]}),
    "plain-rows": ({"fold_visual_projection": False, "skip_last_visual_rows": False}, {}),
}


@pytest.fixture(scope="module")
def apart(pool):
    @functools.cache
    def results(model, merge_by, grids):
        tree = {
            "model": merge(SMALL_MODEL, MODELS[model]),
            "attention": {**PLAIN, "merge": merge_by},
        }
        (found,) = pool.run(losses_and_gradients, 1, tree, layouts_of(grids), UNITS, grids, False)
        return found

    return results


@pytest.mark.parametrize(
    ("name", "model", "grids"),
    [
        *((name, "mistral", CANVAS_GRIDS) for name in SETTINGS),
        ("sdpa", "mistral", PLAIN_GRIDS),
        ("reference", "gemma2", CANVAS_GRIDS),
        ("chunks", "gemma2", PLAIN_GRIDS),
    ],
    ids=lambda value: value if isinstance(value, str) else "canvas" if value[0][0][0] else "tiles",
)
def test_losses_and_gradients_are_those_of_own_images(pool, apart, name, model, grids):
    attention, train = SETTINGS[name]
    tree = {"model": merge(SMALL_MODEL, MODELS[model]), "attention": attention, "train": train}
    arguments = layouts_of(grids), UNITS, grids, True
    ((losses, gradients),) = pool.run(losses_and_gradients, 1, tree, *arguments)
    expected, of_own = apart(model, attention.get("merge", "alpha"), grids)
    torch.testing.assert_close(losses, expected, atol=1e-6, rtol=0)
    assert gradients.keys() == of_own.keys() and len(losses) > 20
    for key, gradient in gradients.items():
        scale = of_own[key].abs().max()
        assert scale > 0, key
        # float32 in places: norms, the loss, positions of rows.
        bound = float(1e-6 * scale)
        torch.testing.assert_close(gradient, of_own[key], atol=bound, rtol=0, msg=key)


# Pairs of what changes ranks, rows and passes.
RUNS = {
    "dp2": (2, {"data": {"text_budget": 256}}),
    "tp2-sp": (2, {"parallel": {"tp": 2, "sp": True}}),
    "tp2-sp-chunks-sum": (
        2,
        {
            "parallel": {"tp": 2, "sp": True},
            "train": {"recompute_visual_chunk": 24},
            "attention": {"merge": "sum"},
        },
    ),
    "pp2": (2, {"parallel": {"pp": 2}}),
    "pp2-recomputed-canvas": (
        2,
        {
            "parallel": {"pp": 2},
            "train": {"recompute": "full"},
            "data": {"image_policy": "anyres_stretch", "visual_budget": 1200},
        },
    ),
    "dp2-frozen-tower-sum-canvas": (
        2,
        {
            "train": {"trains": ["projector", "llm"]},
            "attention": {"merge": "sum"},
            "data": {"image_policy": "anyres_letterbox", "visual_budget": 1200},
        },
    ),
    "fixed-rows": (1, {"data": {"fixed_rows": True}}),
}


@pytest.mark.parametrize("name", RUNS)
def test_runs_have_the_losses_of_own_images(pool, questions, tmp_path, name):
    ranks, sections = RUNS[name]
    sections = merge({"data": {"text_budget": 512, "visual_budget": 256}}, sections)
    sections = merge(sections, {"train": {"global_batch_size": 12}, "optim": {"eps": 1e-5}})
    rows = {}
    for shares in (True, False):
        run_dir = tmp_path / str(shares)
        tree = small_config(
            questions, run_dir, **merge(sections, {"data": {"share_images": shares}})
        )
        assert all(pool.run(train_without_last_save, ranks, tree))
        rows[shares] = read_metrics(run_dir)
    assert len(rows[True]) == 3
    for row, own in zip(rows[True], rows[False], strict=True):
        assert row["supervised_tokens"] == own["supervised_tokens"]
        assert row["loss"] == pytest.approx(own["loss"], rel=1e-6)
        assert row["grad_norm"] == pytest.approx(own["grad_norm"], rel=1e-6)
        # Rows and operations are those that are computed.
        for name, most in (("visual_tokens_per_second", 0.9), ("tflops_per_process", 0.97)):
            computed, of_own = (one[name] * one["seconds_per_step"] for one in (row, own))
            assert computed < most * of_own, name


def test_rows_with_positions_are_not_shared_and_it_is_said(pool, questions, tmp_path):
    rows = {}
    for shares in (True, False):
        data = {"text_budget": 512, "visual_budget": 256, "share_images": shares}
        tree = small_config(
            questions, tmp_path / str(shares), data=data, attention={"t2v_position": "rope"}
        )
        tree["train"]["steps"] = 1
        ((done, log),) = pool.run(run_training_with_log, 1, tree)
        why = "attention.t2v_position=rope" if shares else "data.share_images=false"
        assert done and f"every sample has visual rows of its own: {why}" in log
        rows[shares] = read_metrics(tmp_path / str(shares))
    assert rows[True][0]["loss"] == rows[False][0]["loss"]
