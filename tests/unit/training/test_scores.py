"""Scores while training, with a stand-in for the process that makes them."""

import json
import logging
import os
import sys
from pathlib import Path

import pytest

from dattn_mcore.checkpoint.folders import scored
from dattn_mcore.config.load import load_config
from dattn_mcore.errors import DattnError
from dattn_mcore.training import scores
from dattn_mcore.training.score_checkpoint import SCORES, read_scores
from dattn_mcore.training.scores import ScoreCheckpoints, environment, is_due
from dattn_mcore.training.scores_check import check_scores
from dattn_mcore.training.sinks.sink import Row

# Waits for a file `go`; then scores as many points as steps, or fails as the file says.
STAND_IN = """
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
go = folder.parents[1] / "go"
while not go.exists():
    time.sleep(0.01)
if "killed" in go.read_text():
    os.kill(os.getpid(), signal.SIGKILL)
if "fails" in go.read_text():
    sys.exit("loading\\nerror: the export fails its self-check\\nbye")
request = json.loads((folder / "request.json").read_text())
examples = [{"image": None, "question": "?", "answer": "1", "reference": "2"}]
problems = {"mme": "no images"}
values = {"pope": request["step"] / 2, "mme": None}
(folder / "scores.json").write_text(json.dumps({
    "step": request["step"], "values": values, "problems": problems,
    "notes": {"pope": "all 9 answers are the same"}, "examples": examples,
}))
"""


class Recorder:
    """A sink that remembers."""

    def __init__(self):
        self.rows, self.shown = [], []

    def write(self, row):
        self.rows.append(row)

    def show(self, kind, step, examples):
        self.shown.append((kind, step, len(examples)))

    def close(self):
        pass


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    def stand_in(folder: Path) -> list[str]:
        return [sys.executable, "-S", "-c", STAND_IN, str(folder)]

    monkeypatch.setattr(scores, "command", stand_in)
    monkeypatch.setattr(logging.getLogger("dattn_mcore"), "propagate", True)  # as `caplog` needs
    monkeypatch.setattr(scores, "is_whole", lambda folder: (folder / "whole").exists())
    return tmp_path


def configured(run_dir, *overrides):
    common = ["scores.benchmarks=[pope,mme]", "checkpoint.save_interval=2", "scores.interval=2"]
    return load_config(None, [f"log.run_dir={run_dir}", *common, *overrides])


def checkpoint(run_dir, step):
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    (folder / "whole").touch()
    return folder


def start(run_dir, first_step=0, last_step=9):
    sink = Recorder()
    return ScoreCheckpoints(configured(run_dir), [sink], first_step, last_step), sink


def go(run_dir, how=""):
    (run_dir / "go").write_text(how)


def test_when_it_is_a_checkpoint_s_turn(run_dir):
    steps = [step for step in range(1, 10) if is_due(configured(run_dir), step, 9)]
    assert steps == [2, 4, 6, 8, 9]
    last = configured(run_dir, "scores.interval=null")
    assert [step for step in range(1, 10) if is_due(last, step, 9)] == [9]


def test_one_after_the_other_beside_training(run_dir, caplog):
    hook, sink = start(run_dir)
    folders = [checkpoint(run_dir, step) for step in (2, 3, 4)]
    for folder in folders:
        hook.saved(folder)
    assert hook.num_pending == 2  # step 3 is not due
    assert hook.in_use() == {folders[0], folders[2]}
    assert hook.after_step(None) is None
    assert (run_dir / "scores/step_00000002/request.json").exists()
    assert not (run_dir / "scores/step_00000004").exists()
    assert not sink.rows
    go(run_dir)
    hook.wait(1)
    assert sink.rows == [Row("scores", 2, 9, {"pope": 1.0, "mme": None})]
    assert scored(folders[0]) == {"scores/pope": 1.0} and hook.in_use() == {folders[2]}
    hook.wait(0)
    assert [row.step for row in sink.rows] == [2, 4] and hook.in_use() == set()
    assert scored(folders[2]) == {"scores/pope": 2.0} and scored(folders[1]) == {}
    assert sink.shown == [("scores", 2, 1), ("scores", 4, 1)]
    said = "the score of pope at step 2: all 9 answers are the same"
    assert [record.getMessage() for record in caplog.records].count(said) == 1


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("fails", "the export fails its self-check"),
        ("killed", "its process was killed by SIGKILL"),
    ],
)
def test_a_process_that_fails_is_a_warning(run_dir, caplog, how, why):
    hook, sink = start(run_dir)
    hook.saved(checkpoint(run_dir, 2))
    go(run_dir, how)
    left = run_dir / "scores/step_00000002/hf"
    hook.after_step(None)
    left.mkdir()
    hook.wait(0)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"the checkpoint of step 2 has no scores ({why}); training goes")
    assert not sink.rows and hook.problem is None and hook.in_use() == set()
    assert not left.exists()  # its weights need not stay
    go(run_dir)
    hook.saved(checkpoint(run_dir, 4))
    hook.wait(0)
    assert [row.step for row in sink.rows] == [4]


def test_scores_that_cannot_be_written_end_the_run(run_dir):
    """As any other report: the disk is full."""
    hook, sink = start(run_dir)

    def full(row):
        raise OSError(28, "No space left on device")

    sink.write = full
    go(run_dir)
    hook.saved(checkpoint(run_dir, 2))
    hook.wait(0)
    assert isinstance(hook.after_step(None), DattnError)
    assert "No space left on device" in str(hook.problem)


def test_a_stopped_run_ends_its_process(run_dir):
    hook, sink = start(run_dir)
    hook.saved(checkpoint(run_dir, 2))
    hook.after_step(None)
    process = hook._running.process
    hook.stop()
    assert process.poll() == -9 and not sink.rows and hook.num_pending == 0


def finished(run_dir, step, value):
    folder = run_dir / f"scores/step_{step:08d}"
    folder.mkdir(parents=True)
    fields = {"step": step, "values": {"pope": value}, "problems": {}, "notes": {}, "examples": []}
    (folder / SCORES).write_text(json.dumps(fields))
    return folder


def test_a_resumed_run_makes_good_what_is_missing(run_dir):
    """Resumed at 8: 2 is reported, 4 is not, 6 is half-written, 8 was not begun, 10 is to come."""
    for step in (2, 3, 6, 8, 10):
        checkpoint(run_dir, step)
    for step in (2, 4, 10):
        finished(run_dir, step, float(step))
    (run_dir / "scores/step_00000006").mkdir()
    (run_dir / "scores/step_00000006/answers.jsonl").touch()
    (run_dir / "scores.jsonl").write_text('{"step": 2, "pope": 2.0}\n')
    hook, sink = start(run_dir, first_step=8, last_step=12)
    assert [(row.step, row.values["pope"]) for row in sink.rows] == [(4, 4.0)]
    assert {folder.name for folder in hook.in_use()} == {"step_00000006", "step_00000008"}
    assert not (run_dir / "scores/step_00000010").exists()
    assert not (run_dir / "scores/step_00000006").exists()
    go(run_dir)
    hook.wait(0)
    assert [row.step for row in sink.rows] == [4, 6, 8]


def test_a_row_is_not_written_twice(run_dir):
    checkpoint(run_dir, 2)
    (run_dir / "scores.jsonl").write_text('{"step": 2, "pope": 2.0}\n')
    hook, sink = start(run_dir, first_step=2)  # its folder was deleted
    assert hook.num_pending == 0 and not sink.rows


def test_a_damaged_result_is_made_again(run_dir):
    checkpoint(run_dir, 2)
    (finished(run_dir, 2, 1.0) / SCORES).write_text('{"step": 2}')
    assert read_scores(run_dir / "scores/step_00000002") is None
    hook, _ = start(run_dir, first_step=2)
    assert hook.num_pending == 1


def test_the_process_is_no_rank(monkeypatch):
    given = {
        **{"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "MASTER_ADDR": "there"},
        **{"TORCHELASTIC_RUN_ID": "x", "HOME": "/home", "OMP_NUM_THREADS": "16"},
    }
    found = environment(given)
    assert {name for name in given if name in found} == {"HOME", "OMP_NUM_THREADS"}
    assert found["OMP_NUM_THREADS"] == "1"
    root = Path(scores.__file__).parents[2]  # the packages are found as here
    assert str(root) in found["PYTHONPATH"].split(os.pathsep)


def questions(tmp_path, **changes):
    record = {"question_id": 1, "text": "?", "answer": "7", "image": "a.png", **changes}
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(record) + "\n")
    return f"scores.questions={path}"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["scores.benchmarks=[pope]", "scores.data={tmp}/none"], "scores.data=.* is no folder"),
        (["scores.benchmarks=[pope]", "scores.data={tmp}"], "has pope: .*pope is no folder; put"),
        (["scores.questions={tmp}/none.jsonl"], "scores.questions=.*none.jsonl is no file"),
        ([{"answer": None}], "scores.questions=.*: has no field answer"),
        ([{}], "scores.image_folder=null is no folder; give the one that the image paths"),
        ([{}, "scores.image_folder={tmp}"], "questions.jsonl:1: image 'a.png' is not in"),
        ([{"image": None}, "scores.device=gpu"], "scores.device=gpu needs a GPU"),
    ],
)
def test_what_is_missing_is_said_before_the_first_step(tmp_path, monkeypatch, overrides, message):
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: None)
    given = [
        questions(tmp_path, **each) if isinstance(each, dict) else each.format(tmp=tmp_path)
        for each in overrides
    ]
    with pytest.raises(DattnError, match=message) as caught:
        check_scores(load_config(None, given))
    assert "\n" not in str(caught.value) and "--" not in str(caught.value)


def test_what_is_there_passes(tmp_path):
    from tests.unit.evaluation.trees import make_tree, picture

    tree = make_tree(tmp_path / "val")
    (tmp_path / "a.png").write_bytes(picture(1))
    names = "scienceqa,mme,gqa,pope,textvqa,seed,mmbench,mmstar"
    given = [f"scores.benchmarks=[{names}]", f"scores.data={tree}", questions(tmp_path)]
    check_scores(load_config(None, [*given, f"scores.image_folder={tmp_path}"]))
