"""A corpus with every kind of damage among good samples: training ends, and all is accounted for."""

import io
import json
import os
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from tests.distributed.jobs import read_metrics, run_training, small_config, train_until_killed

GOOD = 36
BATCH = 12


def jpeg(seed=0, size=(56, 56)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=90)
    return out.getvalue()


def png(size):
    out = io.BytesIO()
    Image.new("L", size).save(out, "PNG")
    return out.getvalue()


def truncated(share):
    whole = jpeg(99)
    return whole[: max(4, int(len(whole) * share))]


def flipped():
    """A quantisation table of zero length: a header that opens and a body that no decoder reads."""
    raw = bytearray(jpeg(98))
    place = raw.index(b"\xff\xda")
    raw[place : place + 2] = b"\xff\x00"
    return bytes(raw)


# What is wrong with an image: its bytes, and what the report must say.
BYTES = {
    "empty": (b"", "is an empty file"),
    "html": (b"<html>404 not found</html>", "is not an image (unknown signature"),
    "text": (b"version https://git-lfs.github.com/spec/v1", "is not an image (unknown signature"),
    "zeros": (b"\0" * 4000, "is not an image (unknown signature"),
    "signature-only": (b"\xff\xd8\xff", "no readable header"),
    "bomb": (png((20000, 15000)), "is too large"),
    "no-scan": (flipped(), "cannot be decoded"),
    "broken-png": (png((56, 56))[:40] + b"\xff" * 60, "no readable header"),
    **{
        f"cut-{share:02d}": (truncated(share / 100), "truncated")
        for share in (1, 5, 20, 35, 50, 65, 80, 90, 96, 99)
    },
}
# What is wrong with a record: changes to a good one.
RECORDS = {
    "dotdot": ({"image": "../secret.jpg"}, "leaves the image folder"),
    "absolute": ({"image": "/etc/hostname"}, "is absolute"),
    "nul": ({"image": "a\0b.jpg"}, "unusable path"),
    "empty-path": ({"image": ""}, "empty or unusable path"),
    "number-path": ({"image": 3}, "must be a path"),
    "missing": ({"image": "nowhere.jpg"}, "does not exist"),
    "two-images": ({"image": ["good-0.jpg", "good-1.jpg"]}, "1 <image> mark(s)"),
    "no-image": ({"image": None}, "1 <image> mark(s) in the conversation but 0"),
    "no-mark": ({"conversations": ["what?", "4"]}, "0 <image> mark(s)"),
    "mark-in-answer": ({"conversations": ["what?", "<image>"]}, "stands in a gpt turn"),
    "empty-answer": ({"conversations": ["<image>", "  "]}, "every answer is empty"),
    "no-answer": ({"conversations": ["<image>"]}, "an answer must follow"),
    "no-turns": ({"conversations": []}, "non-empty list"),
    "over-budget": ({"conversations": ["<image>", "4 " * 400]}, "data.text_budget is 128"),
}
# What stands in the file instead of a record.
RAW = {
    "not UTF-8": b'{"id": "caf\xe9", "conversations": []}',
    "malformed JSON": b'{"id" "broken"}',
    "must be an object": b"[1, 2]",
}


def record(name, image, conversations=("<image>\nWhich digit is top-left?", "4")):
    turns = [
        {"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(conversations)
    ]
    return {"id": name, "image": image, "conversations": turns}


@pytest.fixture(scope="module")
def corpus(digits, tmp_path_factory):
    """Folder, and for each bad sample's id or place in the file what its line must say."""
    folder = tmp_path_factory.mktemp("corrupt")
    images = folder / "images"
    images.mkdir()
    (folder / "secret.jpg").write_bytes(jpeg())
    lines, expected = [], {}
    for number in range(GOOD):
        (images / f"good-{number}.jpg").write_bytes(jpeg(number))
        lines.append(json.dumps(record(f"good-{number}", f"good-{number}.jpg")).encode())
    for name, (raw, reason) in BYTES.items():
        (images / f"{name}.jpg").write_bytes(raw)
        lines.append(json.dumps(record(name, f"{name}.jpg")).encode())
        expected[name] = reason
    os.mkfifo(images / "fifo.jpg")
    (images / "folder.jpg").mkdir()
    (images / "outside.jpg").symlink_to(folder / "secret.jpg")
    (images / "loop.jpg").symlink_to("loop.jpg")
    (images / "dangling.jpg").symlink_to("nothing")
    for name, reason in (
        ("fifo", "not a regular file"),
        ("folder", "is a folder"),
        ("outside", "leads to"),
        ("loop", "cannot be resolved"),
        ("dangling", "does not exist"),
    ):
        lines.append(json.dumps(record(name, f"{name}.jpg")).encode())
        expected[name] = reason
    for name, (change, reason) in RECORDS.items():
        made = record(name, "good-0.jpg")
        if "conversations" in change:
            change = {"conversations": record("", "", change["conversations"])["conversations"]}
        lines.append(json.dumps({**made, **change}).encode())
        expected[name] = reason
    for reason, raw in RAW.items():
        lines.append(raw)
        expected[len(lines)] = reason
    # A wrong extension is no damage: what counts is what the file is.
    (images / "png.jpg").write_bytes(png((56, 56)))
    lines.append(json.dumps(record("wrong-extension", "png.jpg")).encode())
    # Bad ones among the good ones.
    order = np.random.default_rng(5).permutation(len(lines))
    (folder / "all.json").write_bytes(b"[\n" + b",\n".join(lines[i] for i in order) + b"\n]\n")
    where = {int(old) + 1: new for new, old in enumerate(order)}
    return folder, {where.get(k, k) if isinstance(k, int) else k: v for k, v in expected.items()}


def tree_for(corpus, digits, run_dir, steps, **sections):
    folder, _ = corpus
    data = {
        "annotations": str(folder / "all.json"),
        "image_folder": str(folder / "images"),
        "index_dir": str(folder / "index"),
        "max_bad_share": 0.9,
        "image_backend": "auto",
    }
    train = {"steps": steps, "global_batch_size": BATCH}
    return small_config(digits, run_dir, data=data, train=train, **sections)


def steps_of(samples):
    return -(-samples // BATCH)


def bad_lines(run_dir):
    lines = [json.loads(line) for line in (run_dir / "bad_samples.jsonl").read_text().splitlines()]
    return sorted(lines, key=lambda line: (line["step"], line["sample"]))


@pytest.fixture(scope="module")
def alone(pool, corpus, digits, tmp_path_factory):
    """A whole epoch in one process."""
    run_dir = tmp_path_factory.mktemp("alone")
    pool.run(run_training, 1, tree_for(corpus, digits, run_dir, None))
    return run_dir


def test_every_sample_is_accounted_for_with_its_reason(corpus, alone):
    _, expected = corpus
    total = GOOD + 1 + len(expected)
    assert len(expected) >= 25
    report = json.loads((alone / "data_report.json").read_text())
    lines = bad_lines(alone)
    left = {line["id"] or line["sample"]: line["reason"] for line in lines if line["step"] <= 5}
    for who, reason in expected.items():
        assert who in left, who
        assert reason in left[who], (who, left[who])
    # The last step runs into the second epoch; the first holds each sample exactly once.
    usable = report["samples_per_epoch"]
    first, *_ = report["epochs"]
    assert report["samples"] == total == usable + report["unusable"]
    assert first["not_reached"] == 0
    assert first["trained"] == GOOD + 1
    assert first["trained"] + first["masked"] + first["skipped"] + first["unusable"] == total
    assert first["masked"] > 5 and first["skipped"] == 1 and first["unusable"] > 20
    drawn = []
    for line in (alone / "samples.jsonl").read_text().splitlines():
        step = json.loads(line)
        out = {*step["skipped"], *step["masked"]}
        drawn += [
            (sample, name not in out)
            for sample, name in zip(step["samples"], step["ids"], strict=True)
        ]
    counts = Counter(sample for sample, _ in drawn[:usable])
    assert len(counts) == usable and set(counts.values()) == {1}
    assert sum(trained for _, trained in drawn[:usable]) == GOOD + 1


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    [(2, {}), (2, {"pp": 2}), (4, {"tp": 2, "sp": True})],
    ids=["dp2", "pp2", "tp2-dp2"],
)
def test_the_same_on_more_ranks(pool, corpus, digits, alone, tmp_path, world_size, parallel):
    pool.run(run_training, world_size, tree_for(corpus, digits, tmp_path, None, parallel=parallel))
    assert bad_lines(tmp_path) == bad_lines(alone)
    for name in ("samples.jsonl", "data_report.json"):
        assert (tmp_path / name).read_text() == (alone / name).read_text()
    for row, want in zip(read_metrics(tmp_path), read_metrics(alone), strict=True):
        # As in test_parity: fp32, sums in another order over a few steps of Adam.
        assert row["loss"] == pytest.approx(want["loss"], rel=1e-4)
        assert row["supervised_tokens"] == want["supervised_tokens"]


def test_killed_twice_with_another_dp_across_an_epochs_end(pool, corpus, digits, alone, tmp_path):
    """dp 1, then 4, then 2: the samples and what became of them are those of one run."""
    whole = tmp_path / "whole"
    steps = len((alone / "samples.jsonl").read_text().splitlines()) + 2
    pool.run(run_training, 1, tree_for(corpus, digits, whole, steps))
    parts = tmp_path / "parts"
    tree = tree_for(corpus, digits, parts, steps)
    pool.run(train_until_killed, 1, tree, 2)
    pool.run(train_until_killed, 4, tree, 2)
    assert all(pool.run(run_training, 2, tree))
    assert (parts / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    assert (parts / "data_report.json").read_text() == (whole / "data_report.json").read_text()
    assert bad_lines(parts) == bad_lines(whole)
    assert len(json.loads((whole / "data_report.json").read_text())["epochs"]) == 2
