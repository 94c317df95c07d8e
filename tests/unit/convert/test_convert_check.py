"""The check at the end of mcore-to-hf: what passes, what does not, and what is left of it."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from rich.console import Console

import dattn_mcore
from dattn_mcore.hf.configuration_dattn import TESTED_TRANSFORMERS
from dattn_mcore.quickstart.run import StepError, run_step
from dattn_mcore.quickstart.steps import ROOT, Step
from tests.unit.convert.convert_helpers import make_checkpoint, make_tokenizer, small_config

# Runs the command in a process of its own, with lines of the test before it.
DRIVER = """
import os, pathlib, shutil, sys
import tools.checkpoint_convert.__main__ as command
{before}
sys.exit(command.main(sys.argv[1:]))
"""
# Appends to the exported modeling file, and to no other: the package's own is whole.
BREAK = """
whole = shutil.copyfile
def copyfile(source, target):
    whole(source, target)
    if pathlib.Path(source).parts[-3:] == ("dattn_mcore", "hf", "modeling_dattn.py"):
        with open(target, "a") as file:
            file.write({code!r})
shutil.copyfile = copyfile
"""
NO_CACHE = """
import functools
_whole = DattnForConditionalGeneration.forward
@functools.wraps(_whole)
def _forgets(self, *args, **kwargs):
    for name in ("past_key_values", "cache"):
        kwargs.pop(name, None)
    return _whole(self, *args, **kwargs)
DattnForConditionalGeneration.forward = _forgets
"""
WRONG_LOGITS = """
import functools
_whole = DattnForConditionalGeneration.forward
@functools.wraps(_whole)
def _off(self, *args, **kwargs):
    out = _whole(self, *args, **kwargs)
    out.logits = out.logits * 1.01
    return out
DattnForConditionalGeneration.forward = _off
"""
# All of a small model but two layers of each part and a part of its 330 words.
FIRST_LAYERS = """
from tools.checkpoint_convert import export_check, first_layers
export_check.WHOLE, first_layers.VOCABULARY = 0, 100
"""


def export(folder, *more, before=""):
    """Runs mcore-to-hf from `folder/a` to `folder/hf`."""
    arguments = ["mcore-to-hf", str(folder / "a"), str(folder / "hf"), *more]
    return subprocess.run(
        [sys.executable, "-c", DRIVER.format(before=before), *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def versions():
    import transformers

    oldest, newest = TESTED_TRANSFORMERS
    return (
        f"this is dattn_mcore {dattn_mcore.__version__} with transformers "
        f"{transformers.__version__}, tested with transformers {oldest} to {newest}"
    )


def anyres_gemma(folder):
    """Soft-caps, windows, tied embeddings, CLIP, several tiles, weights of bf16."""
    config = small_config(make_tokenizer(folder), "gemma2", "clip")
    config = replace(config, data=replace(config.data, image_policy="anyres_letterbox"))
    make_checkpoint(folder / "a", config, torch.bfloat16)


@pytest.mark.parametrize("part", ["", FIRST_LAYERS], ids=["whole", "first layers"])
def test_an_export_is_checked(tmp_path, part):
    """Once, after all processes; logits and picture are the trainer's, and nothing is left over."""
    anyres_gemma(tmp_path)
    done = export(tmp_path, "--processes", "2", before=part)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("checked ")]
    assert ("the first 2 layers of the export" in line) == bool(part)
    found = re.search(r"(\d+) rows of logits differ from the trainer's by (\S+) of", line)
    assert int(found[1]) > 20 and float(found[2]) < 1e-4  # ten times better than the bound
    assert float(re.search(r"without the cache by (\S+),", line)[1]) < 1e-4
    assert int(re.search(r"the picture by (\d) of", line)[1]) <= 2
    assert not list((tmp_path / "hf").glob("first_layers*"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "hf", "tokenizer.model"]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (NO_CACHE, "generation with the cache goes wrong: at new token 2 of 4 its logits are off"),
        (WRONG_LOGITS, "on a prompt with an image its logits are off the trainer's by 0.01"),
    ],
    ids=["no cache", "wrong logits"],
)
def test_a_broken_export_is_refused(tmp_path, code, message):
    """One line with both versions and the tested range; the folder is gone."""
    make_checkpoint(tmp_path / "a", small_config(make_tokenizer(tmp_path)))
    done = export(tmp_path, before=BREAK.format(code=code))
    assert done.returncode == 2, done.stdout
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"error: {tmp_path / 'hf'} fails its self-check: {message}")
    assert versions() in line and "--no-check" in line and "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "tokenizer.model"]


def test_the_quickstart_passes_the_line_on(tmp_path):
    """Its step fails with the converter's own line; without the check the folder is written."""
    make_checkpoint(tmp_path / "a", small_config(make_tokenizer(tmp_path)))
    before = BREAK.format(code="raise TypeError('unknown argument')\n")
    command = (sys.executable, "-c", DRIVER.format(before=before), "mcore-to-hf")
    command += (str(tmp_path / "a"), str(tmp_path / "hf"))
    with pytest.raises(StepError) as raised:
        run_step(Step("convert", "export", command, "typed"), tmp_path, Console(quiet=True))
    assert "cannot be run (TypeError: unknown argument)" in str(raised.value)
    assert versions() in str(raised.value) and not (tmp_path / "hf").exists()
    done = export(tmp_path, "--no-check", before=before)
    assert done.returncode == 0 and "not checked, because of --no-check" in done.stdout
    assert json.loads((tmp_path / "hf/config.json").read_text())["model_type"] == "dattn"
