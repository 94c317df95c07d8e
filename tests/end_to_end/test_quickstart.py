"""The quickstart's own commands, a few steps long: three layouts, export, answers, picture."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys

import transformers
from rich.console import Console

from dattn_mcore.quickstart.picture import draw
from dattn_mcore.quickstart.run import make_run_dir, run_steps
from dattn_mcore.quickstart.steps import ROOT, STAGES, make_run
from dattn_mcore.quickstart.summary import score, show

SHORT = ("train.steps=2", "train.global_batch_size=16", "log.interval=1", "log.tensorboard=false")
# Behind the model's code: what a release does that hands the cache over in a way of its own.
NO_CACHE = """

_whole = DattnForConditionalGeneration.forward


def _forgets(self, *args, past_key_values=None, cache=None, **kwargs):
    return _whole(self, *args, **kwargs)


_forgets.__signature__ = __import__("inspect").signature(_whole)
DattnForConditionalGeneration.forward = _forgets
"""


def test_every_step_takes_what_the_one_before_it_left(digits, tmp_path):
    run = make_run(tmp_path / "run", digits, SHORT)
    run = dataclasses.replace(run, steps=run.steps[1:])  # the small data set is there already
    make_run_dir(run.run_dir, {})
    shown = io.StringIO()
    console = Console(file=shown, width=100)
    seconds = run_steps(run, console)
    result = score(run)
    draw(run, result)
    show(run, result, seconds, sum(seconds.values()), console)

    text = shown.getvalue()
    assert list(seconds) == [*STAGES, "convert", "answer"]
    for stage in STAGES:
        rows = [json.loads(line) for line in run.metrics(stage).read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2]
        assert (run.run_dir / stage / "checkpoints" / "step_00000002" / "dattn.json").is_file()
    assert f"weights from {run.run_dir}/align/checkpoints/step_00000002" in text
    assert f"weights from {run.run_dir}/pretrain/checkpoints/step_00000002" in text
    for layout in ("tp 2 x pp 1 x dp 1", "tp 1 x pp 1 x dp 2", "tp 1 x pp 2 x dp 1"):
        assert layout in text
    assert result.overall.total == 16
    assert (run.run_dir / "hf" / "config.json").is_file()
    assert run.picture.stat().st_size > 10_000
    assert "Held-out questions" in text


def test_a_broken_forward_ends_the_whole_command_with_its_line(tmp_path):
    """Status 1 and one line from a clone whose generation sees one token and no image."""
    clone = tmp_path / "clone"
    for name in ("dattn_mcore", "tools", "configs"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pretrain_dattn.py", clone)
    with (clone / "dattn_mcore/hf/modeling_dattn.py").open("a", encoding="utf-8") as code:
        code.write(NO_CACHE)
    command = [sys.executable, "-m", "dattn_mcore.quickstart", "--data", str(tmp_path / "digits")]
    done = subprocess.run(
        [*command, "--run-dir", str(tmp_path / "run"), *SHORT],
        cwd=clone,
        env={**os.environ, "PYTHONPATH": str(clone)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: step 'convert' failed with status 2: ")
    assert "fails its self-check: generation with the cache goes wrong: at new token 2 of 4" in line
    assert f"with transformers {transformers.__version__}, tested with transformers 5.6 to" in line
    assert not (tmp_path / "run" / "hf").exists()
