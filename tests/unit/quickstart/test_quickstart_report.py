"""The table and the picture at the end, from results that are known."""

import dataclasses
import io
import json

import pytest
from PIL import Image
from rich.console import Console

from dattn_mcore.data.digits_questions import bag_of_digits_ceiling
from dattn_mcore.evaluation.questions import Answer, read_questions, write_answers
from dattn_mcore.quickstart.picture import choose_examples, draw
from dattn_mcore.quickstart.steps import STAGES, make_run
from dattn_mcore.quickstart.summary import score, show


@pytest.fixture
def run(digits, tmp_path):
    """A finished run: every question answered right, the first one wrong."""
    made = make_run(tmp_path, digits)
    questions = read_questions(made.questions)
    answers = [Answer(q.question_id, q.text, q.answer, "a", "m", {}) for q in questions]
    answers[0] = dataclasses.replace(answers[0], text="wrong")
    write_answers(made.answers, answers)
    for stage in STAGES:
        made.metrics(stage).parent.mkdir()
        rows = [{"step": step, "loss": 3.0 / step} for step in (1, 2, 3)]
        rows[1]["loss"] = None  # a step that had nothing to learn from
        made.metrics(stage).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def test_the_table_counts_every_question(run):
    result = score(run)
    assert (result.overall.correct, result.overall.total) == (15, 16)
    shown = io.StringIO()
    show(run, result, {"align": 12.3}, 45.6, Console(file=shown, width=100))
    text = shown.getvalue()
    assert "93.8%" in text
    assert "46 s (align 12 s)" in text
    assert "report.png" in text
    for name in result.categories:
        assert name in text
    assert json.loads(run.score.read_text())["overall"]["correct"] == 15


def test_the_ceiling_of_all_is_weighted_by_the_questions(run):
    result = score(run)
    shown = io.StringIO()
    show(run, result, {}, 1.0, Console(file=shown, width=100))
    expected = sum(bag_of_digits_ceiling(q.category) for q in read_questions(run.questions)) / 16
    assert f"{expected:.1%}" in shown.getvalue()


def test_a_score_that_guessing_explains_is_called_that(run):
    """Two of 16 are right: no more than luck gives one who sees the digits and not their places."""
    questions = read_questions(run.questions)
    answers = [
        Answer(q.question_id, q.text, q.answer if i < 2 else str(i), "a", "m", {})
        for i, q in enumerate(questions)
    ]
    write_answers(run.answers, answers)
    shown = io.StringIO()
    show(run, score(run), {}, 1.0, Console(file=shown, width=100))
    assert "note: overall is not better than guessing" in shown.getvalue()


def test_the_picture_is_drawn(run):
    draw(run, score(run))
    with Image.open(run.picture) as image:
        image.load()
        assert image.width > 1000
        assert len(image.convert("RGB").getcolors(maxcolors=10**6)) > 100


def test_examples_show_every_category_and_need_no_right_answer(run):
    questions = read_questions(run.questions)
    answers = {q.question_id: "wrong" for q in questions}
    chosen = choose_examples(questions, answers, 6)
    assert len({q.question_id for q in chosen}) == 6
    assert {q.category for q in chosen} == {q.category for q in questions}


def test_examples_may_be_fewer_than_places(run):
    questions = read_questions(run.questions)
    answers = {questions[0].question_id: "7"}
    assert choose_examples(questions, answers, 12) == [questions[0]]
