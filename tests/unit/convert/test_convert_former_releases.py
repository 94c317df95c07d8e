"""Checkpoints, settings and exports of earlier releases: read, upgraded, with their own answers."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

from dattn_mcore.checkpoint.manifest import read_manifest
from dattn_mcore.checkpoint.same_run import check_same_model
from dattn_mcore.config.checks import check_config
from dattn_mcore.config.load import load_config, to_dict
from dattn_mcore.config.saved import saved_config
from dattn_mcore.config.schema import Config
from dattn_mcore.errors import CheckpointError
from tests.fixtures.releases import answer_of_export
from tests.former_releases import CHECKPOINT, NAMES, expected_of, unpack
from tools.checkpoint_convert.__main__ import main
from tools.checkpoint_convert.raw_folders import same_bits
from tools.checkpoint_convert.tokenizers_out import SYSTEMS, TURNS, messages

# A few orders of float32's rounding above what two releases of PyTorch differ by.
BOUND = 2e-5
PICTURE = "data/images/1.jpg"
WINDOWS = {"before_architectures": (6, None, 6), "with_architectures": (6, None, 6)}


@pytest.fixture(params=NAMES)
def release(request, tmp_path, monkeypatch) -> Path:
    """The files of a release, unpacked; paths in them are relative to their folder."""
    folder = unpack(request.param, tmp_path)
    monkeypatch.chdir(folder)
    return folder


def logits(export: Path) -> torch.Tensor:
    """In a process of its own: another test may have registered this package's own classes."""
    command = [sys.executable, answer_of_export.__file__, str(export), PICTURE]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    assert found.shape[0] == answer_of_export.ROWS
    return found


def own_logits(release: Path) -> torch.Tensor:
    """What the release's own code said; far from constant, so that equal means something."""
    found = torch.tensor(expected_of(release)["logits"])
    assert found.std() > 0.1
    return found


def test_settings_mean_what_they_meant(release):
    """The YAML that a user wrote, the resolved one of the run, and the checkpoint's agree."""
    written = load_config("run.yaml", ["train.device=cpu"])  # as the run was started
    check_config(written)
    resolved = load_config("runs/small/config.yaml")
    saved = saved_config(read_manifest(release / CHECKPOINT)["config"])
    assert written.model == resolved.model == saved.model
    assert written == resolved
    llm = written.model.llm
    assert llm.windows == WINDOWS[release.name]
    assert llm.sliding_window == 6 and llm.query_scale == 6.0
    if release.name == "before_architectures":
        text = yaml.safe_load((release / "run.yaml").read_text())["model"]["llm"]
        assert {"activation", "post_norms", "sliding_window_every"} <= set(text)
        assert not {"activation", "post_norms", "sliding_window_every"} & set(vars(llm))
    else:
        assert [base for base, _ in llm.ropes] == [100.0, 10000.0]
        assert llm.rope.kind == "linear" and llm.rope.factor == 4.0


def leaves(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if isinstance(tree, dict):
        return [leaf for key, value in tree.items() for leaf in leaves(value, (*path, key))]
    return [path]


def at(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def test_a_manifest_that_lacks_a_setting_means_its_default(release):
    """So that a setting of later does not make another model of it; one that says more is refused."""
    manifest = read_manifest(release / CHECKPOINT)
    config = saved_config(manifest["config"])
    today, default = to_dict(config)["model"], to_dict(Config())["model"]
    shapes_nothing = {("projector", "output_norm_init")}
    shapes_nothing |= {("llm", "init_std"), ("vision", "init_std")}
    same, other = 0, 0
    for path in leaves(today):
        lacking = copy.deepcopy({**manifest, "config": {**manifest["config"], "model": today}})
        del at(lacking["config"]["model"], path[:-1])[path[-1]]
        if at(today, path) == at(default, path) or path in shapes_nothing:
            check_same_model(config, lacking, release)
            same += 1
        else:
            with pytest.raises(CheckpointError, match=r"holds another model: model\."):
                check_same_model(config, lacking, release)
            other += 1
    assert same >= 10 and other >= 15


def test_an_export_answers_as_it_did_and_is_upgraded_by_one_command(release, capsys):
    as_it_was, refreshed = (f"{release.name}_{what}" for what in ("as_it_was", "refreshed"))
    shutil.copytree("export", as_it_was)
    shutil.copytree("export", refreshed)
    assert (logits(Path(as_it_was)) - own_logits(release)).abs().max() < BOUND
    assert main(["refresh", refreshed]) == 0
    assert "weights untouched" in capsys.readouterr().out
    assert (logits(Path(refreshed)) - own_logits(release)).abs().max() < BOUND
    assert main(["verify", CHECKPOINT, refreshed]) == 0
    assert "logits on a fixed input" in capsys.readouterr().out


def test_a_checkpoint_becomes_the_export_that_it_became(release):
    """Weights to the last bit, and the answers, by today's converter and code."""
    new = Path(f"{release.name}_new")
    command = ["mcore-to-hf", CHECKPOINT, str(new), "--tokenizer", "data/tokenizer.model"]
    assert main(command) == 0
    made, before = (load_file(folder / "model.safetensors") for folder in (new, Path("export")))
    assert made.keys() == before.keys()
    assert all(same_bits(made[name], before[name]) for name in made)
    assert (new / "tokenizer.json").read_bytes() == Path("export/tokenizer.json").read_bytes()
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (new, "export")]
    for turns, system in itertools.product(TURNS, SYSTEMS):
        asked = messages(turns, system)
        ours, theirs = (t.apply_chat_template(asked, tokenize=False) for t in tokenizers)
        assert ours == theirs and turns[0] in ours
    assert (logits(new) - own_logits(release)).abs().max() < BOUND


def test_an_export_becomes_a_checkpoint(release, capsys):
    """The way back: the model of the run, from an export that names no features."""
    assert main(["hf-to-mcore", "export", "back"]) == 0
    assert main(["verify", CHECKPOINT, "back"]) == 0
    found = saved_config(json.loads(Path("back/dattn.json").read_text())["config"]).model
    assert found.family == load_config("run.yaml").model.family
    assert found.llm.windows == WINDOWS[release.name]
