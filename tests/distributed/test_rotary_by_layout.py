"""Training with layers that scale rotated queries, or rotate nothing, is that of one process.

Positions are those of the pack's rows on every rank, and a layer's kind follows from its number in
the whole model: neither may depend on shards, stages, or on what is computed again.
"""

import pytest

from dattn_mcore.config.load import merge
from tests.distributed.jobs import read_metrics, train_without_last_save
from tests.distributed.small_models import MINISTRAL3, SMALL_MODEL, SMOLLM3, small_config

FOUR = {"tp": 2, "pp": 2, "sp": True}
CASES = {
    "scaled-queries": (MINISTRAL3, {"recompute": "selective"}),
    "scaled-queries-in-chunks": (MINISTRAL3, {"recompute_visual_chunk": 24}),
    "a-layer-not-rotated": (SMOLLM3, {"recompute": "full"}),
}


def trained(pool, digits, folder, model, **sections):
    """Rows of metrics of three steps."""
    tree = small_config(digits, folder, model=merge(SMALL_MODEL, model), **sections)
    ranks = 4 if "parallel" in sections else 1
    assert all(pool.run(train_without_last_save, ranks, tree))
    return read_metrics(folder)


@pytest.mark.parametrize("case", CASES)
def test_training_is_that_of_one_process(pool, digits, tmp_path, case):
    model, train = CASES[case]
    train = {"global_batch_size": 12, "steps": 3, **train}
    expected = trained(pool, digits, tmp_path / "one", model)
    found = trained(pool, digits, tmp_path / "four", model, parallel=FOUR, train=train)
    for ours, plain in zip(found, expected, strict=True):
        assert ours["loss"] == pytest.approx(plain["loss"], abs=1e-5)
        assert ours["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)
