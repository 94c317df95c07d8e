"""The held-out loss: the same in every layout and split, never trained on, whole over a resume."""

import json

import numpy as np
import pytest

from dattn_mcore.checkpoint.manifest import read_manifest
from dattn_mcore.config.load import from_dict
from dattn_mcore.data.index.store import open_index
from dattn_mcore.data.tokenizer import load_tokenizer
from tests.distributed.interrupted_jobs import train_until_killed
from tests.distributed.jobs import read_metrics, run_training
from tests.distributed.small_models import small_config

HELD_OUT = {"validation": {"share": 0.2, "interval": 2, "samples": 24}}
STILL = {"lr": 1e-9}
LAYOUTS = [
    (2, {"tp": 2, "sp": True}, {}),
    (2, {"pp": 2}, {"text_budget": 200}),
    (2, {}, {}),
    (4, {"tp": 2, "pp": 2, "sp": True}, {"text_budget": 256, "visual_budget": 192}),
    (2, {"cp": 2}, {}),
    (4, {"cp": 2, "pp": 2}, {"visual_budget": 192}),
]


def read(run_dir, name="validation"):
    return read_metrics(run_dir, name)


def losses(row):
    return {name: value for name, value in row.items() if name.startswith("loss")}


@pytest.fixture(scope="module")
def mixed(digits, tmp_path_factory):
    """Two sources: one of text alone, one with images; written so that both have some of each."""
    folder = tmp_path_factory.mktemp("mixed")
    records = json.loads((digits / "instruct.json").read_text())
    text_only = [
        {
            "id": f"text-{n}",
            "conversations": [
                {"from": "human", "value": f"Which digit is after {n % 9}?"},
                {"from": "gpt", "value": f"{n % 9 + 1}, as {n} ends"},
            ],
        }
        for n in range(60)
    ]
    (folder / "text.json").write_text(json.dumps(text_only))
    (folder / "shown.json").write_text(json.dumps(records[:200]))
    return folder


def tree_for(digits, mixed, run_dir, **sections):
    sources = [
        {"annotations": str(mixed / name), "image_folder": str(digits / "images")}
        for name in ("shown.json", "text.json")
    ]
    data = {"sources": sources, **sections.pop("data", {})}
    steps = {"train": {"steps": 4, "global_batch_size": 12}}
    return small_config(digits, run_dir, data=data, **HELD_OUT, **{**steps, **sections})


@pytest.fixture(scope="module")
def alone(pool, digits, mixed, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("alone")
    pool.run(run_training, 1, tree_for(digits, mixed, run_dir))
    return run_dir


@pytest.fixture(scope="module")
def still(pool, digits, mixed, tmp_path_factory):
    """Weights hardly move, so that losses of layouts differ by the rounding of one pass alone."""
    run_dir = tmp_path_factory.mktemp("still")
    pool.run(run_training, 1, tree_for(digits, mixed, run_dir, optim=STILL))
    return run_dir


def test_the_mean_is_over_supervised_tokens_and_by_kind_and_source(alone):
    first, last = read(alone)
    assert (first["step"], last["step"]) == (2, 4)
    assert set(losses(last)) == {"loss", "loss/images", "loss/text_only", "loss/shown", "loss/text"}
    assert last["samples"] == 24
    for row in (first, last):
        for kinds in (("images", "text_only"), ("shown", "text")):
            low, high = sorted(row[f"loss/{kind}"] for kind in kinds)
            assert low < row["loss"] < high
    train = read(alone, "metrics")[-1]
    assert {"loss/shown", "loss/text", "token_share/shown", "token_share/text"} <= set(train)
    assert train["token_share/shown"] + train["token_share/text"] == pytest.approx(1)


def test_sums_by_source_go_on_over_a_save(pool, digits, mixed, tmp_path):
    """A row is about the steps since the last row; a save between them changes nothing."""
    rows = []
    for save_interval in (1000, 3):
        run_dir = tmp_path / str(save_interval)
        saved = {"checkpoint": {"save_interval": save_interval}, "log": {"interval": 4}}
        pool.run(run_training, 1, tree_for(digits, mixed, run_dir, **saved))
        (row,) = read(run_dir, "metrics")
        rows.append({name: row[name] for name in row if name.startswith(("loss", "token_share/"))})
    assert rows[0] == rows[1] and "loss/shown" in rows[0]


@pytest.mark.parametrize(
    ("world_size", "parallel", "data"),
    LAYOUTS,
    ids=["tp2-sp", "pp2", "dp2", "tp2-pp2-sp", "cp2", "cp2-pp2"],
)
def test_equal_in_every_layout_and_split(
    pool, digits, mixed, still, tmp_path, world_size, parallel, data
):
    tree = tree_for(digits, mixed, tmp_path, parallel=parallel, data=data, optim=STILL)
    pool.run(run_training, world_size, tree)
    for row, want in zip(read(tmp_path), read(still), strict=True):
        assert row["supervised_tokens"] == want["supervised_tokens"]
        assert losses(row) == pytest.approx(losses(want), rel=1e-6)
    for row, want in zip(read(tmp_path, "metrics"), read(still, "metrics"), strict=True):
        assert losses(row) == pytest.approx(losses(want), rel=1e-6)
        parts = {name: value for name, value in row.items() if name.startswith("grad_norm/")}
        assert set(parts) == {"grad_norm/vision", "grad_norm/projector", "grad_norm/llm"}
        assert parts == pytest.approx({name: want[name] for name in parts}, rel=1e-4)
        assert sum(value**2 for value in parts.values()) ** 0.5 == pytest.approx(
            row["grad_norm"], rel=1e-5
        )


def test_validation_does_not_change_training(pool, digits, mixed, alone, tmp_path):
    """The same samples are held out, and no pass is made before the last step: the same bits."""
    tree = tree_for(digits, mixed, tmp_path)
    tree["validation"] = {"share": 0.2}
    pool.run(run_training, 1, tree)
    found, want = read_metrics(tmp_path), read_metrics(alone)
    assert [row["loss"] for row in found] == [row["loss"] for row in want]
    assert [row["step"] for row in read(tmp_path)] == [4]


def test_nothing_held_out_is_trained_on(pool, digits, mixed, tmp_path):
    """Over two whole epochs no sample, and no image, of the split is among those of the steps."""
    tree = tree_for(digits, mixed, tmp_path, train={"steps": None, "epochs": 2.0})
    pool.run(run_training, 1, tree)
    config = from_dict(tree)
    index = open_index(config, load_tokenizer(config.data.tokenizer))
    trained = {number for line in read(tmp_path, "samples") for number in line["samples"]}
    sides = np.load(next(index.folder.glob("held_out-*.npy")))
    assert trained == set(np.flatnonzero(sides == 0))
    images = {
        side: {
            image.identity
            for n in np.flatnonzero(sides == side)
            for image in index.sample(n).images
        }
        for side in (0, 1)
    }
    assert images[1] and not images[0] & images[1]
    report = json.loads((tmp_path / "data_report.json").read_text())
    assert report["held_out"] == int((sides == 1).sum())
    in_epochs = [epoch["trained"] for epoch in report["epochs"][:2]]
    assert in_epochs == [int((sides == 0).sum())] * 2


def test_stopped_after_a_pass_it_goes_on_and_remembers_the_best(
    pool, digits, mixed, alone, tmp_path
):
    tree = tree_for(digits, mixed, tmp_path)
    pool.run(train_until_killed, 1, tree, 3)
    assert [row["step"] for row in read(tmp_path)] == [2]
    # What was measured of other weights is not this checkpoint's.
    assert "metrics" not in read_manifest(tmp_path / "checkpoints/step_00000003")
    (tmp_path / "validation.jsonl").unlink()  # the best comes from the checkpoint
    pool.run(run_training, 1, tree)
    (row,) = read(tmp_path)
    want = read(alone)[1]
    assert {n: v for n, v in row.items() if n != "seconds"} == {
        n: v for n, v in want.items() if n != "seconds"
    }
    assert row["best_loss"] == min(r["loss"] for r in read(alone))


def test_ratio_of_update_to_weights(pool, digits, mixed, tmp_path):
    """The first step of Adam moves every element by the rate: ratio = rate / RMS of the weights."""
    one, two = tmp_path / "one", tmp_path / "two"
    log = {"update_ratio": True}
    base = small_config(digits, one, log=log, train={"steps": 2})
    pool.run(run_training, 1, base)
    other = small_config(digits, two, log=log, train={"steps": 2}, parallel={"pp": 2})
    pool.run(run_training, 2, other)
    for row, want in zip(read_metrics(two), read_metrics(one), strict=True):
        ratios = {name: value for name, value in row.items() if name.startswith("update_ratio/")}
        assert len(ratios) == 3
        assert all(1e-4 < value < 1 for value in ratios.values())
        assert ratios == pytest.approx({name: want[name] for name in ratios}, rel=1e-4)
