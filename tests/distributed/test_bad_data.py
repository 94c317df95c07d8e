"""Bad data: every rank does the same, none waits for another, and nothing is lost."""

import json
import shutil

import pytest

from tests.distributed.interrupted_jobs import train_until_killed
from tests.distributed.jobs import (
    read_metrics,
    run_training,
    run_training_of_rank,
    run_training_with_log,
)
from tests.distributed.pool import WorkerError
from tests.distributed.small_models import small_config
from tests.distributed.watched_jobs import weights_by_step


@pytest.fixture
def data_dir(digits, tmp_path):
    """A copy whose files may be spoilt."""
    return shutil.copytree(digits, tmp_path / "digits")


def fails(pool, tree, message, world_size=2, parallel=None):
    """With no bad sample allowed, both ranks must raise the same one line, and soon."""
    tree["parallel"] = parallel or {"pp": 2}
    tree["data"]["max_bad_share"] = 0.0
    with pytest.raises(WorkerError) as caught:
        pool.run(run_training, world_size, tree, timeout=60)
    assert caught.value.kind.__name__ == "DataError"
    assert "\n" not in caught.value.message
    for part in message:
        assert part in caught.value.message


def edit(data_dir, change):
    path = data_dir / "instruct.json"
    records = json.loads(path.read_text())
    change(records)
    path.write_text(json.dumps(records, indent=1))


def first_image(data_dir):
    return next(
        r["image"]
        for r in json.loads((data_dir / "instruct.json").read_text())
        if isinstance(r.get("image"), str)
    )


def keep_only(data_dir, image):
    """Leaves samples of one image, so that the first step meets it."""
    edit(
        data_dir,
        lambda records: records.__setitem__(
            slice(None), [r for r in records if r.get("image") == image] * 12
        ),
    )


@pytest.mark.parametrize(
    "parallel", [{"pp": 2}, {"tp": 2}, {"cp": 2}, {}], ids=["pp2", "tp2", "cp2", "dp2"]
)
def test_truncated_image(pool, data_dir, tmp_path, parallel):
    image = first_image(data_dir)
    path = data_dir / "images" / image
    path.write_bytes(path.read_bytes()[:-200])
    keep_only(data_dir, image)
    fails(pool, small_config(data_dir, tmp_path / "run"), [image, "truncated"], 2, parallel)


def test_the_index_finds_what_needs_no_decoding(pool, data_dir, tmp_path):
    image = first_image(data_dir)
    (data_dir / "images" / image).write_text("<html>404</html>")
    keep_only(data_dir, image)
    fails(pool, small_config(data_dir, tmp_path / "run"), [image, "is not an image"])


def test_missing_annotations(pool, data_dir, tmp_path):
    (data_dir / "instruct.json").unlink()
    fails(pool, small_config(data_dir, tmp_path / "run"), ["data.annotations", "instruct.json"])


@pytest.mark.parametrize("steps", [3, 2], ids=["before the end", "in the last step"])
def test_too_many_bad_samples_end_the_run_and_are_named(pool, data_dir, tmp_path, steps):
    """Damage that only decoding shows, in a share that is reached in the second step."""
    records = json.loads((data_dir / "instruct.json").read_text())
    records = [r for r in records if isinstance(r.get("image"), str)][:24]
    (data_dir / "instruct.json").write_text(json.dumps(records))
    for record in records:
        path = data_dir / "images" / record["image"]
        path.write_bytes(path.read_bytes()[:-200])
    tree = small_config(data_dir, tmp_path / "run", data={"max_bad_share": 0.5})
    tree["parallel"], tree["train"]["steps"] = {"pp": 2}, steps
    tree["checkpoint"]["save_interval"] = 1
    with pytest.raises(WorkerError) as caught:
        pool.run(run_training, 2, tree, timeout=60)
    assert caught.value.kind.__name__ == "DataError"
    saved = [path.name for path in (tmp_path / "run/checkpoints").iterdir()]
    assert saved == ["step_00000001"] and not (tmp_path / "run/finished.json").exists()
    assert (
        "24 of 24 samples are unusable, data.max_bad_share=0.5 allows 12: " in caught.value.message
    )
    assert "is truncated" in caught.value.message and "; and 21 more" in caught.value.message
    lines = (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["sample"] for line in lines) == list(range(24))
    assert {json.loads(line)["step"] for line in lines} == {1, 2}


def test_ranks_that_see_other_data_are_named(pool, data_dir, tmp_path):
    """Each node has its own disk, and one of them misses images: orders would differ."""
    trees = []
    for rank in range(2):
        folder = shutil.copytree(data_dir, tmp_path / f"node{rank}")
        trees.append(small_config(folder, tmp_path / "run", data={"max_bad_share": 1.0}))
    (tmp_path / "node1/images" / first_image(data_dir)).unlink()
    with pytest.raises(WorkerError, match=r"rank 1 on .* has other data than rank 0 on") as caught:
        pool.run(run_training_of_rank, 2, trees)
    assert caught.value.kind.__name__ == "DataError"
    assert "which samples are usable (" in caught.value.message
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_malformed_annotations_name_the_line(pool, data_dir, tmp_path):
    path = data_dir / "instruct.json"
    lines = json.dumps(json.loads(path.read_text()), indent=1).splitlines()
    lines[7] += " }{"
    path.write_text("\n".join(lines))
    fails(pool, small_config(data_dir, tmp_path / "run"), ["instruct.json", "line"])


def test_image_counts_differ(pool, data_dir, tmp_path):
    def drop(records):
        record = next(r for r in records if r.get("image"))
        record["conversations"][0]["value"] = "no picture here"
        record["id"] = "spoilt"

    edit(data_dir, drop)
    fails(pool, small_config(data_dir, tmp_path / "run"), ["spoilt", "<image>"])


def lengthen(data_dir):
    """Gives one sample more text than a pack holds."""

    def change(records):
        record = next(r for r in records if isinstance(r.get("image"), str))
        record["id"] = "long"
        record["conversations"][0]["value"] += " so" * 200
        del records[12:]
        if record not in records:
            records[0] = record

    edit(data_dir, change)


@pytest.mark.parametrize("policy", ["skip", "truncate"])
def test_over_budget_is_counted_and_reported(pool, data_dir, tmp_path, policy):
    lengthen(data_dir)
    tree = small_config(data_dir, tmp_path / "run")
    tree["data"] |= {"over_budget": policy}
    ((done, log),) = pool.run(run_training_with_log, 1, tree)
    assert done and "'long'" in log and "data.over_budget" in log
    # A question cut before its answer has nothing to learn from: skipped under both policies.
    assert [row["skipped"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3]


def test_over_budget_error(pool, data_dir, tmp_path):
    lengthen(data_dir)
    tree = small_config(data_dir, tmp_path / "run")
    tree["data"]["over_budget"] = "error"
    fails(pool, tree, ["'long'", "data.text_budget"])


def test_a_step_without_a_supervised_token_moves_nothing(pool, data_dir, tmp_path):
    """Every image of step 2 is damaged; Adam's momentum of step 1 must not act on the weights."""
    records = json.loads((data_dir / "instruct.json").read_text())
    records = list({r["image"]: r for r in records if isinstance(r.get("image"), str)}.values())
    images = {record["id"]: data_dir / "images" / record["image"] for record in records[:24]}
    (data_dir / "instruct.json").write_text(json.dumps(records[:24]))
    tree = small_config(
        data_dir,
        tmp_path / "run",
        data={"max_bad_share": 0.5},
        train={"global_batch_size": 8},
        optim={"weight_decay": 0.1},
    )
    pool.run(run_training, 2, tree)
    lines = (tmp_path / "run/samples.jsonl").read_text().splitlines()
    second = json.loads(lines[1])["ids"]
    for name in second:
        images[name].write_bytes(images[name].read_bytes()[:-200])
    shutil.rmtree(tmp_path / "run")
    start, first, same, third = pool.run(weights_by_step, 2, tree)[0]
    assert any(not start[name].equal(first[name]) for name in start)
    assert all(first[name].equal(same[name]) for name in first)
    assert any(not same[name].equal(third[name]) for name in same)
    rows = read_metrics(tmp_path / "run")
    assert [row["loss"] is None for row in rows] == [False, True, False]
    assert rows[1]["grad_norm"] is None and rows[1]["supervised_tokens"] == 0
    assert rows[2]["grad_norm"] > 0


def test_saved_before_the_first_update(pool, data_dir, tmp_path):
    """All of step 1 is damaged: Adam has no state yet, and what follows is as without the save."""
    records = json.loads((data_dir / "instruct.json").read_text())
    records = list({r["image"]: r for r in records if isinstance(r.get("image"), str)}.values())
    images = {record["id"]: data_dir / "images" / record["image"] for record in records[:24]}
    (data_dir / "instruct.json").write_text(json.dumps(records[:24]))
    whole, parts = (
        small_config(
            data_dir,
            tmp_path / name,
            data={"max_bad_share": 0.5},
            train={"global_batch_size": 8},
        )
        for name in ("whole", "parts")
    )
    pool.run(run_training, 2, whole)
    line, *_ = (tmp_path / "whole/samples.jsonl").read_text().splitlines()
    for name in json.loads(line)["ids"]:
        images[name].write_bytes(images[name].read_bytes()[:-200])
    shutil.rmtree(tmp_path / "whole")
    pool.run(run_training, 2, whole)
    assert pool.run(train_until_killed, 2, parts, 1) == [False, False]
    assert [path.name for path in (tmp_path / "parts/checkpoints").iterdir()] == ["step_00000001"]
    assert all(pool.run(run_training, 2, parts))
    rows, expected = read_metrics(tmp_path / "parts"), read_metrics(tmp_path / "whole")
    assert [row["loss"] is None for row in rows] == [True, False, False]
    for key in ("loss", "grad_norm", "lr"):
        assert [row[key] for row in rows] == [row[key] for row in expected]


def test_a_run_whose_samples_all_turn_out_bad_ends(pool, data_dir, tmp_path):
    """However many may be bad: with none left there is nothing to go on with."""
    edit(data_dir, lambda records: records.__setitem__(slice(None), records[:12]))
    tree = small_config(data_dir, tmp_path / "run", data={"max_bad_share": 1.0})
    tree["train"]["steps"] = 2
    records = json.loads((data_dir / "instruct.json").read_text())
    for record in records:
        for image in [record["image"]] if isinstance(record["image"], str) else record["image"]:
            path = data_dir / "images" / image
            path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(WorkerError, match="nothing can be trained: 12 of 12 samples are unusable"):
        pool.run(run_training, 1, tree)
    assert not list((tmp_path / "run/checkpoints").glob("step_*"))
