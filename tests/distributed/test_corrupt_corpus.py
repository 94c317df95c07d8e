"""A corpus with every kind of damage among good samples: training ends, and all is accounted for."""

import json
from collections import defaultdict

import pytest

from tests.distributed.corpus import GOOD, write_corpus
from tests.distributed.jobs import read_metrics
from tests.distributed.small_models import small_config
from tests.distributed.unprivileged import run_training_as_anyone, train_until_killed_as_anyone

BATCH = 12


@pytest.fixture(scope="module")
def corpus(digits, tmp_path_factory):
    """Folder, and for each bad sample's id what its line must say."""
    folder = tmp_path_factory.mktemp("corrupt")
    yield folder, write_corpus(folder)
    (folder / "images" / "locked").chmod(0o700)  # so that it can be removed


def tree_for(corpus, digits, run_dir, steps, parallel=None, **more):
    folder, _ = corpus
    data = {
        **more,
        "annotations": str(folder / "all.json"),
        "image_folder": str(folder / "images"),
        "index_dir": str(folder / "index"),
        "max_bad_share": 0.9,
        "image_backend": "auto",
    }
    train = {"steps": steps, "global_batch_size": BATCH}
    return small_config(digits, run_dir, data=data, train=train, parallel=parallel or {})


def bad_lines(run_dir):
    lines = [json.loads(line) for line in (run_dir / "bad_samples.jsonl").read_text().splitlines()]
    return sorted(lines, key=lambda line: (line["step"], line["sample"]))


@pytest.fixture(scope="module")
def alone(pool, corpus, digits, tmp_path_factory):
    """A whole epoch in one process."""
    run_dir = tmp_path_factory.mktemp("alone")
    pool.run(run_training_as_anyone, 1, tree_for(corpus, digits, run_dir, None))
    return run_dir


def fates(run_dir, usable):
    """What became of each sample in the first epoch: (number, trained or the line that says why)."""
    lines = defaultdict(list)
    for line in bad_lines(run_dir):
        lines[line["step"], line["sample"]].append(line)
    found = [(number, line) for (step, number), of in lines.items() if step == 0 for line in of]
    drawn = []
    for text in (run_dir / "samples.jsonl").read_text().splitlines():
        step = json.loads(text)
        drawn += [(step["step"], number) for number in step["samples"]]
    for place in drawn[:usable]:  # the last step runs into the second epoch
        found += [(place[1], line) for line in lines.get(place, ["trained"])]
    return found


def test_every_sample_is_accounted_for_once_with_its_reason(corpus, alone):
    _, expected = corpus
    total = GOOD + 1 + len(expected)
    assert len(expected) >= 25 + 9  # ten truncations are one kind
    report = json.loads((alone / "data_report.json").read_text())
    usable = report["samples_per_epoch"]
    found = fates(alone, usable)
    assert sorted(number for number, _ in found) == list(range(total))
    reasons = {line["id"]: line["reason"] for _, line in found if line != "trained"}
    assert reasons.keys() == expected.keys()
    for who, reason in expected.items():
        assert reason in reasons[who], (who, reasons[who])
    first, *_ = report["epochs"]
    assert report["samples"] == total == usable + report["unusable"]
    assert first["not_reached"] == 0
    assert first["trained"] == GOOD + 1
    assert first["trained"] + first["masked"] + first["skipped"] + first["unusable"] == total
    assert first["masked"] > 5 and first["skipped"] == 1 and first["unusable"] > 20


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [(2, {}), (2, {"pp": 2}), (4, {"tp": 2, "sp": True})],
    ids=["dp2", "pp2", "tp2-dp2"],
)
def test_the_same_on_more_ranks(pool, corpus, digits, alone, tmp_path, world_size, parallel):
    pool.run(
        run_training_as_anyone,
        world_size,
        tree_for(corpus, digits, tmp_path, None, parallel=parallel),
    )
    assert bad_lines(tmp_path) == bad_lines(alone)
    for name in ("samples.jsonl", "data_report.json"):
        assert (tmp_path / name).read_text() == (alone / name).read_text()
    for row, want in zip(read_metrics(tmp_path), read_metrics(alone), strict=True):
        # As in test_features_by_layout: fp32, sums in another order over a few steps of Adam.
        assert row["loss"] == pytest.approx(want["loss"], rel=1e-4)
        assert row["supervised_tokens"] == want["supervised_tokens"]


def test_killed_twice_with_another_dp_across_an_epochs_end(pool, corpus, digits, alone, tmp_path):
    """dp 1, then 4, then 2: the samples and what became of them are those of one run."""
    whole = tmp_path / "whole"
    steps = len((alone / "samples.jsonl").read_text().splitlines()) + 2
    packs = {"step_packs_multiple": 2}  # of several samples each: steps of unlike sizes
    pool.run(run_training_as_anyone, 1, tree_for(corpus, digits, whole, steps, **packs))
    parts = tmp_path / "parts"
    tree = tree_for(corpus, digits, parts, steps, **packs)
    pool.run(train_until_killed_as_anyone, 1, tree, 2)
    pool.run(train_until_killed_as_anyone, 4, tree, 2)
    assert all(pool.run(run_training_as_anyone, 2, tree))
    assert (parts / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    assert (parts / "data_report.json").read_text() == (whole / "data_report.json").read_text()
    assert bad_lines(parts) == bad_lines(whole)
    assert len(json.loads((whole / "data_report.json").read_text())["epochs"]) == 2
