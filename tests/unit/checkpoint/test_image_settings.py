"""A run goes on only while its images stay the same pixels; an old checkpoint means the old rules."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dattn_mcore.checkpoint.same_run import check_same_run
from dattn_mcore.config.load import from_dict, load_config, to_dict
from dattn_mcore.config.saved import saved_config
from dattn_mcore.config.schema import Config
from dattn_mcore.data.index.identity import fingerprint_of, image_settings_of
from dattn_mcore.errors import CheckpointError

FOLDER = Path("runs/x/checkpoints/step_00000004")
SAMPLES: dict[str, Any] = {
    **{"content": "c", "usable": "u", "weights": [1.0], "tokenizer": "t", "template": "plain"},
    **{"num_samples": 9, "num_usable": 8},
}
NEW = ("apply_orientation", "transparency", "anyres_ties")


def identity(config: Config) -> dict[str, Any]:
    return {**SAMPLES, "images": image_settings_of(config.data)}


def manifest_of(config: Config) -> dict[str, Any]:
    there = identity(config)
    return {
        **{"step": 4, "config": to_dict(config)},
        **{"data": there, "data_fingerprint": fingerprint_of(there)},
    }


def old_manifest(config: Config) -> dict[str, Any]:
    """Of before image settings were part of the data's identity, and before there were rules."""
    there = copy.deepcopy(SAMPLES)
    tree = to_dict(config)
    for name in NEW:
        del tree["data"][name]
    return {"step": 4, "config": tree, "data": there, "data_fingerprint": fingerprint_of(there)}


def refusal(config: Config, manifest: dict[str, Any]) -> str:
    with pytest.raises(CheckpointError) as caught:
        check_same_run(config, manifest, FOLDER, identity(config))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        ({"apply_orientation": False}, "data.apply_orientation=true"),
        ({"transparency": "drop"}, "data.transparency=white"),
        ({"anyres_ties": "first"}, "data.anyres_ties=aspect"),
        ({"image_mean": (0.4, 0.5, 0.5)}, "data.image_mean=[0.5,0.5,0.5]"),
        ({"image_std": (0.4, 0.5, 0.5)}, "data.image_std=[0.5,0.5,0.5]"),
        ({"anyres_grids": ((2, 1),)}, "data.anyres_grids=[[1,2],[2,1]]"),
        ({"image_policy": "anyres_letterbox"}, "data.image_policy=anyres_stretch"),
    ],
)
def test_a_change_is_refused_and_names_the_way_back(change: dict[str, Any], setting: str) -> None:
    config = from_dict(
        {"data": {"image_policy": "anyres_stretch", "anyres_grids": [[1, 2], [2, 1]]}}
    )
    manifest = json.loads(json.dumps(manifest_of(config)))
    check_same_run(config, manifest, FOLDER, identity(config))
    other = replace(config, data=replace(config.data, **change))
    line = refusal(other, manifest)
    assert f"add {setting}" in line
    given = line.split("add ")[1].split(" to go on")[0].split(" ")
    typed = load_config(None, given).data  # exactly as the line says them
    names = [each.split("=")[0].removeprefix("data.") for each in given]
    back = replace(other.data, **{name: getattr(typed, name) for name in names})
    again = replace(other, data=back)
    check_same_run(again, manifest, FOLDER, identity(again))


@pytest.mark.parametrize("policy", ["stretch", "anyres_stretch"])
def test_an_old_checkpoint_means_the_old_rules(policy: str) -> None:
    config = from_dict({"data": {"image_policy": policy}})
    manifest = json.loads(json.dumps(old_manifest(config)))
    line = refusal(config, manifest)
    assert "add data.apply_orientation=false" in line
    assert ("data.anyres_ties=first" in line) == (policy == "anyres_stretch")
    assert "transparency" not in line  # white was the rule before it had a name
    old = {"apply_orientation": False, "anyres_ties": "first"}
    kept = replace(config, data=replace(config.data, **old))
    check_same_run(kept, manifest, FOLDER, identity(kept))
    data = saved_config(manifest["config"]).data
    assert (data.apply_orientation, data.anyres_ties, data.transparency) == (
        False,
        "first",
        "white",
    )


def test_other_samples_are_reported_as_such() -> None:
    config = Config()
    for make in (manifest_of, old_manifest):
        manifest = make(config)
        manifest["data"] = {**manifest["data"], "template": "mistral"}
        manifest["data_fingerprint"] = fingerprint_of(manifest["data"])
        assert "was trained on other data (data.template)" in refusal(config, manifest)


def test_ties_do_not_matter_where_no_canvas_is_stretched() -> None:
    for policy in ("stretch", "anyres_letterbox"):
        config = from_dict({"data": {"image_policy": policy}})
        other = replace(config, data=replace(config.data, anyres_ties="first"))
        check_same_run(other, manifest_of(config), FOLDER, identity(other))
