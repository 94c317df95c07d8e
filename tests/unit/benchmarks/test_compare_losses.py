"""The comparison of two commits: what it runs, what it calls equal, and what it returns."""

import contextlib
import json
from pathlib import Path

import pytest

from benchmarks import compare_losses
from benchmarks.checkouts import Checkout
from benchmarks.compare_losses import first_difference, main, read_metrics
from dattn_mcore.errors import ConfigError, DattnError
from dattn_mcore.quickstart.run import StepError
from dattn_mcore.quickstart.steps import STAGES


def rows(*losses, grad_norm=2.5):
    return [
        {"step": number, "loss": loss, "grad_norm": grad_norm, "seconds_per_step": number}
        for number, loss in enumerate(losses, start=1)
    ]


def test_equal_is_to_the_last_bit():
    nan = float("nan")
    assert first_difference(rows(3.25, 1e-9, None, nan), rows(3.25, 1e-9, None, nan)) is None
    assert first_difference(rows(0.1 + 0.2), rows(0.3)) == (
        "step 1: loss 0.30000000000000004 and 0.3, 5.55e-17 apart"
    )
    assert first_difference(rows(1.0, 0.0), rows(1.0, -0.0)) is not None
    assert first_difference(rows(1.0, None), rows(1.0, 2.0)) == "step 2: loss None and 2.0"


def test_the_first_step_and_both_figures_are_named():
    base, head = rows(1.0, 2.0, 3.0), rows(1.0, 2.0, 3.5)
    head[1]["grad_norm"] = 2.75
    assert first_difference(base, head) == "step 2: grad_norm 2.5 and 2.75, 0.25 apart"
    assert first_difference(rows(1.0), rows(1.5, grad_norm=3.0)) == (
        "step 1: loss 1.0 and 1.5, 0.5 apart; grad_norm 2.5 and 3.0, 0.5 apart"
    )


def test_another_number_of_steps_is_a_difference():
    assert first_difference(rows(1.0, 2.0), rows(1.0)) == "2 and 1 steps"
    other = rows(1.0, 2.0)
    other[1]["step"] = 3
    assert first_difference(rows(1.0, 2.0), other).startswith("step 2: step 2 and 3")


def test_metrics_that_hold_nothing_are_no_equality(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("")
    with pytest.raises(DattnError, match="has no step; nothing can be compared"):
        read_metrics(path)
    path.write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n")
    with pytest.raises(DattnError, match="has a step without grad_norm"):
        read_metrics(path)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(0.1 + 0.2)))
    assert read_metrics(path) == rows(0.1 + 0.2)


def write_settings(folder):
    """As an earlier commit had them: a form of before, and another layout."""
    folder.mkdir(parents=True)
    former = "model: {llm: {activation: silu}}\nparallel: {tp: 2, pp: 2}\n"
    for stage in STAGES:
        (folder / f"digits_{stage}.yaml").write_text(former)


@pytest.fixture
def steps(monkeypatch, tmp_path):
    """Steps in place of the quickstart's: the loss is the stage's number, HEAD's `off` on top.

    Yields:
        The commands that were run, and `off` by stage.
    """
    ran, off = [], {}

    @contextlib.contextmanager
    def checked_out(name, folder):
        if name == "none":
            raise ConfigError("'none' is no commit")
        if folder.name == "settings":
            write_settings(folder / "configs")
        yield Checkout(name, folder)

    def run_step(step, logs, console, clone):
        assert (logs / "output.log").is_file()
        ran.append((clone.name, step))
        if step.name == "data":
            return
        if off.get(step.name) == "fails":
            raise StepError(f"step {step.name!r} failed")
        (run_dir,) = [word for word in step.command if word.startswith("log.run_dir=")]
        run_dir = Path(run_dir.partition("=")[2])
        run_dir.mkdir(parents=True)
        loss = 1.0 + (off.get(step.name, 0.0) if clone.name == "head" else 0.0)
        lines = "".join(json.dumps(row) + "\n" for row in rows(2.0, loss))
        (run_dir / "metrics.jsonl").write_text(lines)

    monkeypatch.setattr(compare_losses, "checked_out", checked_out)
    monkeypatch.setattr(compare_losses, "run_step", run_step)
    monkeypatch.chdir(tmp_path)
    return ran, off


def test_the_three_stages_of_each_commit_in_their_own_layouts(steps, capsys):
    ran, _ = steps
    assert main(["old", "new"]) == 0
    stages = ["data", "align", "pretrain", "instruct"]
    assert [(side, step.name) for side, step in ran] == [
        (side, name) for side in ("base", "head") for name in stages
    ]
    for side, step in ran:
        others = {"base", "head"} - {side}
        assert all(f"/compare_losses/{other}/" not in " ".join(step.command) for other in others)
        if step.name != "data":
            assert "2 pretrain_dattn.py" in step.typed and "train.device=cpu" in step.typed
            assert "parallel." not in step.typed and "train.seed" not in step.typed
            assert "train.steps" not in step.typed and "log.interval=1" in step.typed
    shown = capsys.readouterr().out
    for stage in stages[1:]:
        assert f"| {stage} | own | 2 | equal |" in shown
        assert f"old, layout own, stage {stage}: 0s\n" in shown
    assert "BASE old, HEAD new" in shown


def test_layouts_steps_and_seed_are_the_same_on_both_sides(steps, capsys):
    ran, _ = steps
    options = ["--steps", "2", "--seed", "7", "--until", "align"]
    assert main(["old", "new", *options, "--layouts", "one", "tp2", "pp2", "dp2", "one"]) == 0
    trained = [(side, step.typed) for side, step in ran if step.name == "align"]
    layouts = {}
    for side, typed in trained:
        assert "train.steps=2" in typed and "train.seed=7" in typed
        processes = typed.partition("--nproc-per-node ")[2][0]
        sizes = [typed.partition(f"parallel.{name}=")[2][0] for name in ("tp", "pp")]
        layouts.setdefault(side, []).append((processes, *sizes))
    assert layouts["base"] == layouts["head"]
    assert layouts["base"] == [("1", "1", "1"), ("2", "2", "1"), ("2", "1", "2"), ("2", "1", "1")]
    assert capsys.readouterr().out.count("| align |") == 4


def test_both_sides_read_the_settings_of_one_commit(steps, capsys):
    ran, _ = steps
    assert main(["old", "new", "--settings-of", "older", "--until", "align"]) == 0
    typed = [step.typed for _, step in ran if step.name == "align"]
    files = {words.partition("--config ")[2].partition(" ")[0] for words in typed}
    assert len(typed) == 2 and len(files) == 1
    assert files.pop().endswith("/settings/configs/digits_align.yaml")
    assert all("--nproc-per-node 4 " in words for words in typed)
    assert "BASE old, HEAD new, settings of older" in capsys.readouterr().out
    assert main(["old", "new", "--settings-of", "none"]) == 2
    assert capsys.readouterr().err == "error: 'none' is no commit\n"


def test_a_difference_is_shown_and_is_status_1(steps, capsys):
    steps[1]["pretrain"] = 0.5
    assert main(["old", "new"]) == 1
    shown = capsys.readouterr().out
    assert "| pretrain | own | 2 | step 2: loss 1.0 and 1.5, 0.5 apart |" in shown
    assert "| align | own | 2 | equal |" in shown


def test_data_and_runs_of_an_earlier_comparison_are_not_taken(steps, tmp_path):
    assert main(["old", "new", "--until", "align"]) == 0
    stale = tmp_path / "runs/compare_losses/base/digits"
    stale.mkdir()
    assert main(["old", "new", "--until", "align"]) == 0
    assert not stale.exists()


def test_what_cannot_be_compared_is_one_line_and_status_2(steps, tmp_path, capsys):
    assert main(["none"]) == 2
    assert capsys.readouterr().err == "error: 'none' is no commit\n"
    steps[1]["align"] = "fails"
    assert main(["old", "new"]) == 2
    assert capsys.readouterr().err == "error: old, layout own: step 'align' failed\n"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/base").write_text("a file")
    assert main(["old", "new", "--out", "mine"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    for arguments in (["old", "--steps", "0"], ["old", "--layouts", "tp3"], []):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
