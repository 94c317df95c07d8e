"""`refresh`: an older export gets today's code and processor; its weights stay as they are."""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import transformers

import dattn_mcore.hf
from dattn_mcore.data.tiles import POLICIES
from dattn_mcore.hf import REMOTE_CODE_FILES, TESTED_TRANSFORMERS
from dattn_mcore.hf.image_rules_dattn import OLD_RULES
from tests.matrix.exports import ARCHITECTURES, trainer_config
from tests.unit.convert.convert_helpers import make_checkpoint, make_tokenizer, small_config
from tests.unit.hf.hf_models import TEXT_FEATURES
from tools.checkpoint_convert.__main__ import main

OLD = Path(__file__).parents[2] / "fixtures/export_0"
KEPT = ("model", "tokenizer", "chat_template", "generation_config")  # beginnings of names


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """A checkpoint, its export, and the same as the code of release 0 wrote it."""
    folder = tmp_path_factory.mktemp("sides")
    config = trainer_config(ARCHITECTURES["gemma2_siglip_anyres"], OLD / "tokenizer.model")
    # The old export names no image rules, and so means those of before they were named.
    config = replace(config, data=replace(config.data, **asdict(OLD_RULES)))
    make_checkpoint(folder / "mcore", config)
    assert main(["mcore-to-hf", str(folder / "mcore"), str(folder / "hf")]) == 0
    shutil.copytree(OLD, folder / "old", ignore=shutil.ignore_patterns("README.md", "*.model"))
    shutil.copy2(folder / "hf/model.safetensors", folder / "old")
    return folder


@pytest.fixture
def old(sides, tmp_path):
    """A copy of the old export to change."""
    return Path(shutil.copytree(sides / "old", tmp_path / "old"))


def state(folder):
    """Bytes and times of all files."""
    return {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in folder.iterdir()}


def refreshed(capsys, folder):
    """Lines of a refresh that must succeed."""
    assert main(["refresh", str(folder)]) == 0
    return capsys.readouterr().out.splitlines()


def refused(capsys, folder):
    """The line of a refresh that must fail, and leave all as it was."""
    before = state(folder) if folder.is_dir() else None
    assert main(["refresh", str(folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert before is None or state(folder) == before
    return line


def test_old_export(sides, old, capsys):
    before = state(old)
    lines = refreshed(capsys, old)
    after = state(old)
    assert lines[-1] == f"{old}: {len(lines) - 1} files renewed; weights untouched"
    named = {line.split(":")[0] for line in lines[:-1]}
    assert named == {name for name in after if after[name] != before.get(name)}
    assert not any(name.startswith(KEPT) and name not in REMOTE_CODE_FILES for name in named)
    code = Path(dattn_mcore.hf.__path__[0])
    assert all(after[name][0] == (code / name).read_bytes() for name in REMOTE_CODE_FILES)
    config, earlier = (json.loads(files["config.json"][0]) for files in (after, before))
    records = {
        "dattn_mcore_version": dattn_mcore.__version__,
        "tested_transformers": list(TESTED_TRANSFORMERS),
        "transformers_version": transformers.__version__,
    }
    today = json.loads((sides / "hf/config.json").read_text())["auto_map"]
    features = {name: config[f"{name}_features"] for name in ("text", "vision")}
    assert features["text"]["norms"] == TEXT_FEATURES["gemma2"]["norms"]
    assert features["vision"]["class_row"] is False
    assert config == earlier | records | {
        "auto_map": today,
        "text_features": features["text"],
        "vision_features": features["vision"],
    }
    for name, value in records.items():
        assert f"{name} {json.dumps(earlier.get(name))} -> {json.dumps(value)}" in lines[-2]
    # As a fresh export, but for what the older transformers wrote into config.json.
    fresh = state(sides / "hf")
    same = set(fresh) - {"config.json", "generation_config.json", "tokenizer_config.json"}
    assert all(after[name][0] == fresh[name][0] for name in same if name in named)
    assert set(after) == set(fresh)
    assert refreshed(capsys, old) == [f"{old}: up to date; weights untouched"]
    assert state(old) == after


def test_features_in_words_of_before_get_their_form_of_today(old, capsys):
    """Releases that named features called norms `pre` or `sandwich`, and norms of heads true."""
    refreshed(capsys, old)
    today = json.loads((old / "config.json").read_text())
    words = today["text_features"] | {"norms": "sandwich", "qk_norm": False}
    (old / "config.json").write_text(json.dumps(today | {"text_features": words}))
    assert any("text_features" in line for line in refreshed(capsys, old))
    assert json.loads((old / "config.json").read_text()) == today


def test_answers_of_the_trainer(sides, old, capsys):
    """`verify` compares weights, and the logits of both sides on text and two images.

    tests/matrix compares answers, under other releases of transformers as well.
    """
    refreshed(capsys, old)
    assert main(["verify", str(sides / "mcore"), str(old)]) == 0
    assert "logits on a fixed input" in capsys.readouterr().out


@pytest.mark.parametrize("policy", POLICIES)
def test_a_fresh_export_is_up_to_date(tmp_path, capsys, policy):
    """Settings of the processor are kept, whatever image policy they say."""
    config = small_config(make_tokenizer(tmp_path), kind="clip")
    data = replace(config.data, image_policy=policy, image_mean=(0.4, 0.5, 0.6))
    make_checkpoint(tmp_path / "mcore", replace(config, data=data))
    folder = tmp_path / "hf"
    assert main(["mcore-to-hf", str(tmp_path / "mcore"), str(folder)]) == 0
    capsys.readouterr()
    before = state(folder)
    assert refreshed(capsys, folder) == [f"{folder}: up to date; weights untouched"]
    # What a release has changed in the processor's file is renewed, what it says is kept.
    file = folder / "processor_config.json"
    settings = json.loads(file.read_text())
    settings.pop("auto_map")
    file.write_text(json.dumps(settings))
    lines = refreshed(capsys, folder)
    assert len(lines) == 2 and lines[0].startswith("processor_config.json: auto_map null -> ")
    assert file.read_bytes() == before["processor_config.json"][0]


def test_folders_that_are_no_exports(old, tmp_path, capsys):
    assert "config.json cannot be read" in refused(capsys, tmp_path / "nothing")
    config = json.loads((old / "config.json").read_text())
    for change, expected in (
        ({"model_type": "llava"}, "model_type is 'llava'; it must be 'dattn': give a folder"),
        ({"dattn_mcore_version": "99.1"}, "dattn_mcore_version is '99.1', this is dattn_mcore "),
        ({"v2v": "diagnal"}, "v2v is 'diagnal'"),
        ({"vocab_size": 0, "text_config": 3}, "config.json is malformed"),
    ):
        (old / "config.json").write_text(json.dumps(config | change))
        line = refused(capsys, old)
        assert line.startswith("error: ") and expected in line, line
    (old / "config.json").write_text("[]")
    assert "config.json cannot be read" in refused(capsys, old)


def test_damaged_folders(old, capsys):
    (old / "processor_config.json").rename(old / "elsewhere.json")
    assert "no processor_config.json" in refused(capsys, old)
    (old / "elsewhere.json").rename(old / "processor_config.json")
    text = (old / "tokenizer.json").read_text()
    (old / "tokenizer.json").write_text("{")
    assert "tokenizer" in refused(capsys, old)
    (old / "tokenizer.json").write_text(text)
    weights = (old / "model.safetensors").read_bytes()
    (old / "model.safetensors").write_bytes(weights[:-1])
    assert "model.safetensors" in refused(capsys, old)
    (old / "model.safetensors").unlink()
    assert str(old) in refused(capsys, old)


def test_all_files_or_none(old, capsys):
    """The last file cannot be written: none is new."""
    (old / ".config.json.refresh.tmp").mkdir()
    before = {name: (old / name).read_bytes() for name in ("config.json", "modeling_dattn.py")}
    assert main(["refresh", str(old)]) == 2
    assert f"error: {old} cannot be written" in capsys.readouterr().err
    assert all((old / name).read_bytes() == data for name, data in before.items())
    assert len(list(old.glob(".*"))) == 1
    (old / ".config.json.refresh.tmp").rmdir()
    assert len(refreshed(capsys, old)) > 2


# A signal that arrives while the first file takes its place.
STOPPED = """
import os, pathlib, signal, sys
from tools.checkpoint_convert import __main__
whole = pathlib.Path.replace
def replace(self, target):
    if self.name.endswith(".refresh.tmp"):
        os.kill(os.getpid(), signal.SIGTERM)
    return whole(self, target)
pathlib.Path.replace = replace
sys.exit(__main__.interruptible())
"""


def test_a_signal_waits_until_all_files_are_in_place(old, capsys):
    done = subprocess.run(
        [sys.executable, "-c", STOPPED, "refresh", str(old)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 128 + signal.SIGTERM
    message = "stopped by SIGTERM; the folder is whole, with all of its files renewed or none"
    assert done.stderr.splitlines()[-1] == message
    assert refreshed(capsys, old) == [f"{old}: up to date; weights untouched"]


def test_links_stay_behind(old, tmp_path, capsys):
    """A folder of links into a store, as a download is: the store keeps its files."""
    store = old.rename(tmp_path / "store")
    old.mkdir()
    for file in store.iterdir():
        (old / file.name).symlink_to(file)
    before = state(store)
    refreshed(capsys, old)
    assert state(store) == before
    assert (old / "model.safetensors").is_symlink() and not (old / "config.json").is_symlink()
