"""Real processes, killed without warning at no particular moment: no sample is lost or repeated."""

import json
import os
import random
import re
import shutil
import time

import pytest

from tests.distributed.faults import start_ranks
from tests.distributed.jobs import read_metrics, run_training
from tests.distributed.small_models import small_config
from tests.distributed.test_corrupt_corpus import bad_lines
from tests.ranks import end_ranks

HELD_OUT = 30
SAMPLES, STEPS = 40, 14  # of 12 samples: four epochs


@pytest.fixture
def few(digits, tmp_path):
    """Annotations of a few samples, one of them with a damaged image."""
    images = shutil.copytree(digits / "images", tmp_path / "images", copy_function=os.link)
    records = json.loads((digits / "instruct.json").read_text())[:SAMPLES]
    shown = next(record for record in records if isinstance(record.get("image"), str))
    (images / "cut.png").write_bytes((images / shown["image"]).read_bytes()[:-200])
    shown["image"] = "cut.png"
    (tmp_path / "few.json").write_text(json.dumps(records))
    others = json.loads((digits / "instruct.json").read_text())
    mine = {str(record.get("image")) for record in records}
    others = [record for record in others if str(record.get("image")) not in mine]
    (tmp_path / "held_out.json").write_text(json.dumps(others[:HELD_OUT]))
    return tmp_path / "few.json", images


def has_stepped(log):
    """Whether a start has done a step of its own."""
    return log.exists() and re.search(rf"step +\d+/{STEPS} ", log.read_text()) is not None


@pytest.mark.parametrize(
    ("multiple", "parallel"),
    [(None, {}), (4, {}), (None, {"cp": 2})],
    ids=["samples", "packs", "cp2"],
)
def test_sigkill_at_any_moment(pool, digits, few, tmp_path, multiple, parallel):
    """Twice, on 4 ranks, then on 2; on a single one it goes on to the end."""
    annotations, images = few
    data = {"annotations": str(annotations), "image_folder": str(images), "max_bad_share": 0.5}
    sections = {
        "data": {**data, "step_packs_multiple": multiple},
        "train": {"steps": STEPS, "global_batch_size": 14 if multiple else 12},
    }
    if multiple is None:  # a pass after each step: many a kill falls into one
        held_out = str(annotations.with_name("held_out.json"))
        sources = [{"annotations": held_out, "image_folder": str(images)}]
        sections["validation"] = {"sources": sources, "interval": 1}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    pool.run(run_training, 1, small_config(digits, whole, **sections))
    often = {"save_interval": 1}
    tree = small_config(digits, parts, checkpoint=often, parallel=parallel, **sections)
    moment = random.Random(f"{multiple} {parallel}")
    for world_size in (4, 2):
        folder = tmp_path / f"dp{world_size}"
        ranks = start_ranks(tree, folder, "nothing", world_size=world_size)
        try:
            deadline = time.monotonic() + 300
            while not has_stepped(folder / "rank0.log"):
                assert time.monotonic() < deadline and ranks[0].is_alive()
                time.sleep(0.01)
            time.sleep(moment.uniform(0, 0.6))  # in a step, between two, or in a save
            assert all(rank.is_alive() for rank in ranks)
        finally:
            end_ranks(ranks)  # SIGKILL to each
    assert not (parts / "finished.json").exists()
    tree = small_config(digits, parts, **sections)  # saves take longer than steps here
    assert all(pool.run(run_training, 1, tree))
    assert [row["step"] for row in read_metrics(parts)] == list(range(1, STEPS + 1))
    if multiple is None:
        passes = [read_metrics(folder, "validation") for folder in (parts, whole)]
        assert [row["step"] for row in passes[0]] == list(range(1, STEPS + 1))
        for row, want in zip(*passes, strict=True):
            assert row["samples"] == want["samples"] == HELD_OUT
            # Parts of the run had other layouts, whose weights differ by rounding.
            assert row["loss"] == pytest.approx(want["loss"], rel=1e-3)
            assert row["best_step"] == want["best_step"]
    for name in ("samples.jsonl", "data_report.json"):
        assert (parts / name).read_text() == (whole / name).read_text(), name
    assert bad_lines(parts) == bad_lines(whole)
    report = json.loads((whole / "data_report.json").read_text())
    complete = [epoch for epoch in report["epochs"] if not epoch["not_reached"]]
    assert len(complete) >= 3
    for epoch in complete:
        assert (epoch["trained"], epoch["masked"]) == (SAMPLES - 1, 1)
