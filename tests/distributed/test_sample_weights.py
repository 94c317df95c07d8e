"""A sample's weight: the loss is sum(w * loss) / sum(w), and so is its gradient, in every layout."""

import json
import shutil

import pytest
import torch

from tests.distributed.jobs import read_metrics, run_training
from tests.distributed.small_models import SMALL_MODEL, small_config
from tests.distributed.weighted_jobs import oracle, trained

LAYOUTS = (((True, 16), (False, 9)), ((False, 4), (True, 16), (False, 6)))
TREE = {"model": SMALL_MODEL}
WEIGHTS = [[0.25, 3.0, 1.0], [2.0], [0.125, 40.0]]  # of the supervised rows of three micro-batches


def test_loss_and_gradient_are_a_weighted_mean(pool):
    ((expected, exact),) = pool.run(oracle, 1, TREE, LAYOUTS, WEIGHTS)
    ((loss, gradients),) = pool.run(trained, 1, TREE, LAYOUTS, WEIGHTS)
    ((plain, _),) = pool.run(trained, 1, TREE, LAYOUTS, [[1.0]] * 3)
    assert abs(loss - expected) < 1e-6 * expected  # float32 logits
    assert abs(plain - expected) > 1e-3
    for name, gradient in exact.items():
        # Float32 sums in another order, of the size of the largest.
        torch.testing.assert_close(
            gradients[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()) + 1e-9
        )


def weigh(folder, weight):
    path = folder / "instruct.json"
    records = json.loads(path.read_text())
    for number, record in enumerate(records):
        record["weight"] = weight(number)
    path.write_text(json.dumps(records))


@pytest.fixture(scope="module")
def one(pool, digits, tmp_path_factory):
    """A data set of weighted samples, and its metrics in one process."""
    folder = tmp_path_factory.mktemp("weighted") / "digits"
    shutil.copytree(digits, folder)
    weigh(folder, lambda number: (0.25, 1, 4)[number % 3])
    run_dir = tmp_path_factory.mktemp("one")
    assert all(pool.run(run_training, 1, small_config(folder, run_dir)))
    return folder, read_metrics(run_dir)


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (2, {"tp": 2, "sp": True}),
        (2, {"pp": 2}),
        (2, {}),
        (4, {"pp": 2, "tp": 2, "sp": True}),
        (2, {"cp": 2}),
    ],
    ids=["tp2-sp", "pp2", "dp2", "tp2-pp2-sp", "cp2"],
)
def test_every_layout_has_the_loss_of_one_process(pool, one, tmp_path, ranks, parallel):
    folder, expected = one
    tree = small_config(folder, tmp_path / "run")
    tree["parallel"] = parallel
    assert all(pool.run(run_training, ranks, tree))
    for row, other in zip(read_metrics(tmp_path / "run"), expected, strict=True):
        assert abs(row["loss"] - other["loss"]) < 1e-5 * other["loss"]
        assert abs(row["grad_norm"] - other["grad_norm"]) < 1e-4 * other["grad_norm"]
        assert row["supervised_tokens"] == other["supervised_tokens"]


def test_equal_weights_are_none(pool, digits, one, tmp_path):
    folder = tmp_path / "digits"
    shutil.copytree(digits, folder)
    found = []
    for name in ("plain", "fours"):
        assert all(pool.run(run_training, 1, small_config(folder, tmp_path / name)))
        found.append([row["loss"] for row in read_metrics(tmp_path / name)])
        weigh(folder, lambda number: 4)
    # A power of two: the sums are exact, the update is not, by the one rounding of the scale.
    assert found[0][0] == found[1][0]
    assert all(abs(a - b) < 1e-5 * a for a, b in zip(*found, strict=True))
    assert found[0][0] != one[1][0]["loss"]
