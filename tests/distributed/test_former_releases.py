"""A run that an earlier release began goes on under this one, to the losses that it had there."""

from __future__ import annotations

from pathlib import Path

import pytest

from dattn_mcore.checkpoint.manifest import read_manifest
from tests.distributed.jobs import read_metrics
from tests.former_releases import CHECKPOINT, NAMES, expected_of, train_in, unpack

LAYOUTS = {"one": (1, {}), "tp2-sp": (2, {"tp": 2, "sp": True}), "dp2": (2, {})}


def files_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and times of an index, but for its lock."""
    files = [file for file in folder.rglob("*") if file.is_file() and ".lock" not in file.name]
    return {str(file): (file.read_bytes(), file.stat().st_mtime_ns) for file in files}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_run_goes_on_to_the_same_losses(pool, tmp_path, name, layout):
    """Weights, optimizer, schedule and place in the data; the index that is there stays as it was.

    It is of a former version, so one of this release is made beside it. Bounds as for layouts: another PyTorch may add in another order.
    """
    folder = unpack(name, tmp_path)
    index = files_of(folder / "data/.index")
    assert len(index) >= 5
    world_size, parallel = LAYOUTS[layout]
    assert all(pool.run(train_in, world_size, str(folder), {"parallel": parallel}))
    found, expected = read_metrics(folder / "runs/small"), expected_of(folder)["steps"]
    assert [row["step"] for row in found] == [row["step"] for row in expected] == [3, 4]
    for row, want in zip(found, expected, strict=True):
        assert row["supervised_tokens"] == want["supervised_tokens"]
        assert row["lr"] == pytest.approx(want["lr"], rel=1e-12)
        assert row["loss"] == pytest.approx(want["loss"], abs=1e-5)
        assert row["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)
    # Step 4 would be another one without what step 3 had learned.
    assert abs(expected[0]["loss"] - expected[1]["loss"]) > 1e-3
    now = files_of(folder / "data/.index")
    assert {file: now.get(file) for file in index} == index and len(now) > len(index)
    saved = folder / CHECKPOINT.replace("02", "04")
    assert read_manifest(saved)["step"] == 4


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        # What the frozen files say in another form, or not at all, matters.
        ("before_architectures", "model.llm.layer_pattern", []),
        ("with_architectures", "model.llm.sliding_rotary_base", None),
    ],
    ids=["pattern", "base"],
)
def test_with_another_model_it_does_not_go_on(pool, tmp_path, name, setting, value):
    """Refused by the name of the setting: its translation is compared, not passed over."""
    folder = unpack(name, tmp_path)
    tree: dict = {}
    branch = tree
    *sections, field = setting.split(".")
    for section in sections:
        branch = branch.setdefault(section, {})
    branch[field] = value
    with pytest.raises(Exception, match=f"holds another model: {setting} is "):
        pool.run(train_in, 1, str(folder), tree)
