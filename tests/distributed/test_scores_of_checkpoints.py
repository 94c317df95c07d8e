"""Scores while training, with real models: beside it, killed in an evaluation, and resumed."""

import json
import time

import psutil
import pytest

from dattn_mcore.evaluation.__main__ import main
from tests.distributed.faults import start_ranks
from tests.distributed.jobs import run_training
from tests.distributed.small_models import small_config
from tests.ranks import end_ranks
from tests.unit.evaluation.trees import make_tree

STEPS = 4


@pytest.fixture
def tree(digits, tmp_path):
    """Settings of a run whose checkpoints answer digits questions and a small POPE."""

    data = make_tree(tmp_path / "val")

    def made(run_dir):
        return small_config(
            digits,
            run_dir,
            train={"steps": STEPS},
            checkpoint={"save_interval": 2, "keep": 1},
            scores={
                "benchmarks": ["pope", "mme"],
                "data": str(data),
                "questions": str(digits / "heldout_questions.jsonl"),
                "image_folder": str(digits / "images"),
                "interval": 2,
                "samples": 6,
                "max_new_tokens": 4,
                "device": "cpu",
                "keep_export": True,
            },
        )

    return made


def rows(run_dir):
    return [json.loads(line) for line in (run_dir / "scores.jsonl").read_text().splitlines()]


def by_hand(digits, data, folder, out):
    """The commands of docs/evaluation.md over the exported checkpoint."""
    model = f"--model={folder / 'hf'}"
    common = ["--max-new-tokens=4", "--device=cpu", "--limit=6"]
    asked = [f"--data={data}", "--benchmarks=pope,mme", f"--out={out}"]
    assert main(["run", model, *asked, *common]) == 0
    questions = f"--questions={digits / 'heldout_questions.jsonl'}"
    answers = f"--answers={out / 'answers.jsonl'}"
    images = f"--image-folder={digits / 'images'}"
    assert main(["answer", model, questions, images, answers, *common]) == 0
    json_file = f"--json={out / 'questions.json'}"
    assert main(["score-questions", questions, answers, json_file, "--limit=6"]) == 0
    found = json.loads((out / "scores.json").read_text())["benchmarks"]
    exact = json.loads((out / "questions.json").read_text())
    return {
        **{name: found[name]["value"] for name in ("pope", "mme")},
        "questions": 100 * exact["overall"]["accuracy"],
    }


def texts(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def kill_in_an_evaluation(tree, folder, run_dir):
    """Ends all ranks while the last checkpoint answers; returns the process that did it."""
    ranks = start_ranks(tree, folder, "nothing")
    last = run_dir / f"scores/step_{STEPS:08d}"
    try:
        deadline = time.monotonic() + 400
        while not (last / "benchmarks/run.json").exists():
            assert time.monotonic() < deadline and ranks[0].is_alive()
            time.sleep(0.02)
        scoring = psutil.Process(ranks[0].pid).children(recursive=True)
        assert any("score_checkpoint" in " ".join(child.cmdline()) for child in scoring)
    finally:
        end_ranks(ranks)  # SIGKILL to each
    _, alive = psutil.wait_procs(scoring, timeout=20)
    assert not alive
    assert not (last / "scores.json").exists()


def test_checkpoints_of_context_parallel_ranks_are_scored(pool, digits, tree, tmp_path):
    """An export holds the whole model, whatever ranks have divided the rows that it learned from."""
    settings = {**tree(tmp_path / "run"), "parallel": {"cp": 2}}
    assert all(pool.run(run_training, 2, settings, timeout=500))
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found] == [2, STEPS]
    folder = tmp_path / f"run/scores/step_{STEPS:08d}"
    expected = by_hand(digits, tmp_path / "val", folder, tmp_path / "by_hand")
    assert {name: found[-1][name] for name in expected} == expected


def test_beside_training_and_killed_in_an_evaluation(pool, digits, tree, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert all(pool.run(run_training, 2, tree(whole), timeout=500))
    found = rows(whole)
    assert [row["step"] for row in found] == [2, STEPS]
    for row in found:
        folder = whole / f"scores/step_{row['step']:08d}"
        out = tmp_path / f"by_hand_{row['step']}"
        expected = by_hand(digits, tmp_path / "val", folder, out)
        assert {name: row[name] for name in expected} == expected
        assert texts(folder / "answers.jsonl") == texts(out / "answers.jsonl")
        ours = folder / "benchmarks/answers/pope.jsonl"
        assert texts(ours) == texts(out / "answers/pope.jsonl")
    assert json.loads((whole / "finished.json").read_text()) == {"step": STEPS}
    assert not list((whole / "scores").glob("*/*.tmp"))

    settings = tree(parts)
    kill_in_an_evaluation(settings, tmp_path / "killed", parts)
    assert [row["step"] for row in rows(parts)] == [2]
    assert not (parts / "finished.json").exists()
    assert all(pool.run(run_training, 2, settings, timeout=500))
    assert rows(parts) == found
    assert (parts / "finished.json").exists()
