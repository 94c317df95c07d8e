"""Every feature in every layout, and beside every other feature: the losses of one process.

The cases hold every pair (`features.py`). Each is compared, over three optimizer steps, with one
process that keeps every row to the end, in one pack, and uses the plain attention backend. From
the second step on the losses also show that the *updates* agreed. Bounds are those of the design:
1e-5 for the loss, relative 1e-4 for the gradient norm (fp32, sums in another order).
"""

import pytest

from dattn_mcore.config.load import merge
from tests.distributed.features import (
    CASES,
    LAYOUT,
    MEANING,
    PLAIN,
    case_id,
    plain_case,
    processes,
    settings_of,
    with_every_value,
)
from tests.distributed.interrupted_jobs import train_until_killed
from tests.distributed.jobs import read_metrics, train_without_last_save
from tests.distributed.small_models import small_config

# Adam divides a gradient by its own size, so that an element of which rounding is all there is steps
# by the whole rate, up or down: one such element of 60,000 moved a loss by 2e-5. This is far above
# rounding, and far below what gradients are here.
ADAM_EPS = 1e-5
BF16 = with_every_value([*LAYOUT, "family", "trains", "overlap", "recompute"])


@pytest.fixture(scope="module")
def train(pool, digits, shapes, tmp_path_factory):
    """Runs a case to its third step, in one go or in two, and returns its metrics."""

    def run(case, more):
        folder = digits if case["images"] == "one-tile" else shapes
        run_dir = tmp_path_factory.mktemp("run")
        sections = merge(settings_of(case), {"optim": {"eps": ADAM_EPS}})
        tree = small_config(folder, run_dir, **merge(sections, more))
        ranks = processes(case)
        if case["run"] != "uninterrupted":
            assert pool.run(train_until_killed, ranks, tree, 1) == [False] * ranks
            assert [row["step"] for row in read_metrics(run_dir)] == [1]
        if case["run"] == "resumed-on-one":
            tree, ranks = {**tree, "parallel": {}}, 1
        assert all(pool.run(train_without_last_save, ranks, tree))
        return read_metrics(run_dir)

    return run


@pytest.fixture(scope="module")
def expected(train):
    """Metrics of what a case is compared with; cases of one meaning share them."""
    done = {}

    def metrics(case):
        key = tuple(case[name] for name in MEANING)
        if key not in done:
            done[key] = train(plain_case(case), PLAIN)
        return done[key]

    return metrics


def assert_learns(rows, case):
    """Otherwise a comparison says nothing: the loss falls, and the gradients are not zero."""
    assert len(rows) == 3
    alone = case["trains"] == "projector-alone"
    assert rows[2]["loss"] < rows[0]["loss"] - (1e-3 if alone else 0.05)
    assert all(row["grad_norm"] > (1e-3 if alone else 1e-2) for row in rows)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_losses_are_those_of_one_process(train, expected, case):
    rows, want = train(case, {}), expected(case)
    assert_learns(want, case)
    assert len(rows) == 3
    for row, plain in zip(rows, want, strict=True):
        assert row["supervised_tokens"] == plain["supervised_tokens"]
        assert row["loss"] == pytest.approx(plain["loss"], abs=1e-5)
        assert row["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("case", BF16, ids=case_id)
def test_bf16_follows_fp32(train, expected, case):
    """bf16 weights with float32 masters: the same loss to its precision (2^-8), and it learns."""
    rows, want = train(case, {"train": {"precision": "bf16"}}), expected(case)
    losses, plain = [row["loss"] for row in rows], [row["loss"] for row in want]
    assert losses == pytest.approx(plain, rel=0.02)
    assert losses != plain
    assert_learns(rows, case)
