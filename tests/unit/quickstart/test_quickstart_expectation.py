"""A quickstart that learned nothing, or a blind one that sees, does not end with status 0."""

import pytest

from dattn_mcore.errors import ConfigError
from dattn_mcore.evaluation.exact_match import Tally
from dattn_mcore.evaluation.questions import Answer, read_questions, write_answers
from dattn_mcore.quickstart import __main__ as command
from dattn_mcore.quickstart import picture
from dattn_mcore.quickstart.expectation import ExpectationError, expectation
from dattn_mcore.quickstart.run import StepError


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("train.seed=7",),
        ("train.seed=7", "train.device=cpu"),
        ("parallel.cp=2",),
        ("model.visual_positions=true",),
    ],
)
def test_the_shipped_settings_must_reach_nine_of_ten(overrides):
    bounds = expectation(overrides)
    bounds.check(Tally(360, 400))
    bounds.check(Tally(400, 400))
    with pytest.raises(ExpectationError, match=r"359 of 400 .* \(89\.8%\).* reach 90%"):
        bounds.check(Tally(359, 400))


def test_a_blind_model_must_stay_near_guessing():
    bounds = expectation(("train.seed=3", "model.visual_positions=false"))
    bounds.check(Tally(0, 400))
    bounds.check(Tally(120, 400))
    with pytest.raises(ExpectationError, match=r"121 of 400 .*at most 30%"):
        bounds.check(Tally(121, 400))


@pytest.mark.parametrize(
    "overrides", [("train.steps=2",), ("model.visual_positions=false", "train.steps=2")]
)
def test_other_settings_have_no_bound(overrides):
    expectation(overrides).check(Tally(0, 400))
    expectation(overrides).check(Tally(400, 400))


def test_a_setting_that_does_not_exist_is_named():
    with pytest.raises(ConfigError, match=r"train\.sed"):
        expectation(("train.sed=7",))


@pytest.fixture
def finished(monkeypatch, digits, tmp_path):
    """Runs the command on answers that are there already: how many of 16 are right is chosen."""

    def run_with(right: int, *overrides: str) -> int:
        folder = tmp_path / "run"

        def leave_answers(run, console):
            questions = read_questions(run.questions)
            texts = [q.answer if i < right else "no" for i, q in enumerate(questions)]
            answers = [
                Answer(q.question_id, q.text, text, "a", "m", {})
                for q, text in zip(questions, texts, strict=True)
            ]
            write_answers(run.answers, answers)
            return {}

        monkeypatch.setattr(command, "run_steps", leave_answers)
        monkeypatch.setattr(picture, "draw", lambda run, result: run.picture)
        return command.main(["--run-dir", str(folder), "--data", str(digits), *overrides])

    return run_with


def test_too_few_right_answers_end_with_status_1_and_one_line(finished, capsys):
    assert finished(13) == 1
    written = capsys.readouterr()
    assert written.err.count("\n") == 1
    assert written.err.startswith("error: 13 of 16 held-out questions are right (81.2%)")
    assert "Held-out questions" in written.out  # the table is shown all the same


def test_enough_right_answers_end_with_status_0(finished, capsys):
    assert finished(15, "train.seed=5") == 0
    assert capsys.readouterr().err == ""


def test_a_blind_run_that_sees_ends_with_status_1(finished, capsys):
    assert finished(6, "model.visual_positions=false") == 1
    assert "at most 30%" in capsys.readouterr().err
    assert finished(4, "model.visual_positions=false") == 0


def test_a_failed_step_ends_with_status_1(monkeypatch, digits, tmp_path, capsys):
    def fail(run, console):
        raise StepError("step 'convert' failed with status 1: the export does not agree")

    monkeypatch.setattr(command, "run_steps", fail)
    assert command.main(["--run-dir", str(tmp_path / "run"), "--data", str(digits)]) == 1
    assert capsys.readouterr().err == (
        "error: step 'convert' failed with status 1: the export does not agree\n"
    )
