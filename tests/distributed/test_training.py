"""Training beyond parity: bf16, a loss that is not finite, the dry run's numbers."""

import math

import pytest

from dattn_mcore.config.load import from_dict, merge
from dattn_mcore.training.plan import stage_summary
from tests.distributed.jobs import (
    GEMMA,
    SMALL_MODEL,
    count_parameters,
    read_metrics,
    run_training,
    small_config,
)
from tests.distributed.pool import WorkerError


@pytest.mark.parametrize(
    ("world_size", "parallel"), [(1, {}), (4, {"tp": 2, "pp": 2, "sp": True})], ids=["one", "4d"]
)
def test_bf16_follows_fp32(pool, digits, tmp_path, world_size, parallel):
    """bf16 weights with float32 masters: the same loss to its precision (2^-8), and it learns."""
    train = {"precision": "bf16", "steps": 8}
    rows = {}
    for name, sections in {
        "fp32": {"train": {"steps": 8}},
        "bf16": {"train": train, "parallel": parallel},
    }.items():
        tree = small_config(digits, tmp_path / name, **sections)
        assert all(pool.run(run_training, world_size if name == "bf16" else 1, tree))
        rows[name] = [row["loss"] for row in read_metrics(tmp_path / name)]
    assert rows["bf16"] == pytest.approx(rows["fp32"], rel=0.02)
    assert rows["bf16"] != rows["fp32"]
    assert rows["bf16"][-1] < rows["bf16"][0] - 0.3


def test_a_loss_that_is_not_finite_stops_all_ranks(pool, digits, tmp_path):
    tree = small_config(digits, tmp_path, parallel={"pp": 2}, optim={"lr": 1e30, "clip_grad": 0.0})
    with pytest.raises(WorkerError, match="DattnError: the loss is (nan|inf)"):
        pool.run(run_training, 2, tree, timeout=60)
    assert all(math.isfinite(row["loss"]) for row in read_metrics(tmp_path))


CLIP = {"vision": {"kind": "clip", "activation": "quick_gelu", "select_layer": -2}}


@pytest.mark.parametrize(
    ("model", "world_size", "parallel"),
    [
        ({}, 1, {}),
        ({}, 4, {"tp": 2, "pp": 2}),
        (GEMMA, 2, {"pp": 2}),
        (merge(GEMMA, CLIP), 2, {"tp": 2}),
        ({"visual_positions": False}, 2, {"pp": 2, "vpp": 2}),
    ],
    ids=["one", "tp2-pp2", "tied", "clip", "interleaved"],
)
def test_dry_run_counts_what_is_built(pool, model, world_size, parallel):
    tree = {"model": merge(SMALL_MODEL, model), "parallel": parallel}
    config = from_dict(tree)
    for stage, counted in pool.run(count_parameters, world_size, tree):
        total, trained, _ = stage_summary(config, stage)
        assert (total, trained) == counted
