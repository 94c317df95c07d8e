"""Training beyond parity: bf16, a loss that is not finite, the dry run's numbers."""

import math

import pytest

from dattn_mcore.config.load import from_dict, merge
from dattn_mcore.training.dry_run import stage_summary
from tests.distributed.jobs import read_metrics, run_training, train_without_last_save
from tests.distributed.model_jobs import count_parameters
from tests.distributed.pool import WorkerError
from tests.distributed.small_models import AIMV2, CLIP, GEMMA, SMALL_MODEL, small_config


def test_bf16_learns_as_fp32_does(pool, digits, tmp_path):
    """Over more steps than `test_features_by_layout`, to its precision (2^-8)."""
    layout = {"tp": 2, "pp": 2, "sp": True}
    rows = {}
    for precision, ranks, parallel in (("fp32", 1, {}), ("bf16", 4, layout)):
        train = {"precision": precision, "steps": 8}
        tree = small_config(digits, tmp_path / precision, train=train, parallel=parallel)
        assert all(pool.run(train_without_last_save, ranks, tree))
        rows[precision] = [row["loss"] for row in read_metrics(tmp_path / precision)]
    assert rows["bf16"] == pytest.approx(rows["fp32"], rel=0.02)
    assert rows["bf16"] != rows["fp32"]
    assert rows["bf16"][-1] < rows["bf16"][0] - 0.3


def test_a_loss_that_is_not_finite_stops_all_ranks(pool, digits, tmp_path):
    tree = small_config(digits, tmp_path, parallel={"pp": 2}, optim={"lr": 1e30, "clip_grad": 0.0})
    with pytest.raises(WorkerError, match="DattnError: the loss is (nan|inf)"):
        pool.run(run_training, 2, tree, timeout=60)
    assert all(math.isfinite(row["loss"]) for row in read_metrics(tmp_path))


@pytest.mark.parametrize(
    ("model", "world_size", "parallel"),
    [
        ({}, 1, {}),
        ({}, 4, {"tp": 2, "pp": 2}),
        (GEMMA, 2, {"pp": 2}),
        (merge(GEMMA, CLIP), 2, {"tp": 2}),
        (AIMV2, 2, {"tp": 2}),
        ({"visual_positions": False}, 2, {"pp": 2, "vpp": 2}),
    ],
    ids=["one", "tp2-pp2", "tied", "clip", "aimv2", "interleaved"],
)
def test_dry_run_counts_what_is_built(pool, model, world_size, parallel):
    tree = {"model": merge(SMALL_MODEL, model), "parallel": parallel}
    config = from_dict(tree)
    for stage, counted in pool.run(count_parameters, world_size, tree):
        total, trained, _ = stage_summary(config, stage)
        assert (total, trained) == counted
