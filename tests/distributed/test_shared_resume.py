"""A run whose samples share images, stopped in an epoch, goes on as if it had not been stopped.

The samples are questions about few images and records with branches. An epoch is three and a half
steps; the runs are stopped in the second step, and end in the second epoch.
"""

import json
import shutil

import pytest

from tests.distributed.interrupted_jobs import train_until_killed
from tests.distributed.jobs import read_metrics, run_training
from tests.distributed.small_models import small_config

STEPS, STOPPED, SIZE = 5, 2, 8
QUESTION = "<image>\nWhich digit is in the top-left cell?"
ORDERS = {"grouped": {"group_images": True}, "shared": {}}


@pytest.fixture(scope="module")
def branched(questions, tmp_path_factory):
    """The questions, and four records with branches about the same images."""
    folder = tmp_path_factory.mktemp("branched") / "data"
    shutil.copytree(questions, folder)
    path = folder / "instruct.json"
    records = json.loads(path.read_text())
    for number in range(4):
        branches = [
            [
                {"from": "human", "value": QUESTION},
                {"from": "gpt", "value": f"The digit is {number + branch}."},
            ]
            for branch in range(2 + number % 2)
        ]
        records.append({"id": f"b{number}", "image": f"{number % 3}.png", "branches": branches})
    path.write_text(json.dumps(records))
    return folder


def tree_of(folder, run_dir, order):
    return small_config(
        folder,
        run_dir,
        data={"text_budget": 256, "visual_budget": 128, **ORDERS[order]},
        train={"steps": STEPS, "global_batch_size": SIZE},
        # Of another number of ranks gradients are summed in another order; Adam divides by the
        # root of their squares, and a larger eps keeps what is near zero there.
        optim={"eps": 1e-5},
    )


def samples(run_dir):
    return [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(pool, branched, tmp_path_factory):
    """Folders of runs that were never stopped, by order of samples and ranks."""
    done = {}

    def run(order, ranks):
        if (order, ranks) not in done:
            run_dir = tmp_path_factory.mktemp("whole")
            assert all(pool.run(run_training, ranks, tree_of(branched, run_dir, order)))
            done[order, ranks] = run_dir
        return done[order, ranks]

    return run


@pytest.mark.parametrize(
    ("order", "first", "then"),
    [("grouped", 1, 1), ("grouped", 2, 2), ("grouped", 1, 2), ("grouped", 2, 1), ("shared", 1, 2)],
    ids=["grouped", "grouped-dp2", "grouped-to-dp2", "grouped-from-dp2", "shared-to-dp2"],
)
def test_stopped_in_an_epoch_and_resumed(pool, branched, whole, tmp_path, order, first, then):
    expected = whole(order, first)
    tree = tree_of(branched, tmp_path, order)
    assert pool.run(train_until_killed, first, tree, STOPPED) == [False] * first
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert all(pool.run(run_training, then, tree))
    assert samples(tmp_path) == samples(expected)
    rows, wanted = read_metrics(tmp_path), read_metrics(expected)
    assert len(rows) == STEPS
    for row, want in zip(rows, wanted, strict=True):
        for name in ("loss", "grad_norm"):
            if first == then:
                assert row[name] == want[name]
            else:
                assert row[name] == pytest.approx(want[name], rel=1e-6)


def test_the_runs_share_images_and_have_orders_of_their_own(branched, whole):
    """Else the test above would say nothing about shared images and groups."""
    records = json.loads((branched / "instruct.json").read_text())
    images = {
        one["id"]: [one["image"]] if isinstance(one.get("image"), str) else one.get("image", [])
        for one in records
    }
    seen = {}
    for order in ORDERS:
        run_dir = whole(order, 1)
        steps = [line["ids"] for line in samples(run_dir)]
        seen[order] = steps
        assert any(name.startswith("b") for name in steps[0] + steps[1])
        for names, row in zip(steps, read_metrics(run_dir), strict=True):
            shown = 16 * sum(len(images[name]) for name in names)
            computed = row["visual_tokens_per_second"] * row["seconds_per_step"]
            assert computed < 0.95 * shown, order
    assert seen["grouped"] != seen["shared"]
    sets = {
        order: [len({str(images[n]) for n in s}) for s in steps] for order, steps in seen.items()
    }
    assert sum(sets["grouped"]) < sum(sets["shared"])  # a group stands within a step
