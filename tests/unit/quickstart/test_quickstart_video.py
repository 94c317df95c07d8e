"""The videos' quickstart: score beside the guess without time, bounds, film strips."""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from dattn_mcore.data import video_digits
from dattn_mcore.data.video_digits import VideoDigitsSizes, frames_of, prepare_video_digits
from dattn_mcore.data.video_digits_questions import Beats
from dattn_mcore.data.vp9 import write_vp9
from dattn_mcore.errors import DataError
from dattn_mcore.evaluation.exact_match import Tally
from dattn_mcore.evaluation.questions import Answer, write_answers
from dattn_mcore.quickstart.expectation import ExpectationError, video_expectation
from dattn_mcore.quickstart.steps import DATA as IMAGE_DATA
from dattn_mcore.quickstart.steps import QuickstartRun
from dattn_mcore.quickstart.summary import show
from dattn_mcore.quickstart.video_picture import (
    Frames,
    choose_examples,
    draw,
    read_frames_of,
    strip,
)
from dattn_mcore.quickstart.video_score import best_guess, read_tasks, score
from dattn_mcore.quickstart.video_steps import DATA, make_video_run


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A finished run: every question answered right, the first one wrong."""
    monkeypatch.setattr(video_digits, "write_vp9", lambda path, frames: np.save(path, frames))
    data = prepare_video_digits(tmp_path / "data", VideoDigitsSizes(train=4, heldout=24))
    folder = tmp_path / "run"
    (folder / "video").mkdir(parents=True)
    made = QuickstartRun(
        run_dir=folder,
        steps=(),
        questions=data / "heldout_questions.jsonl",
        image_folder=data / "videos",
        answers=folder / "answers.jsonl",
        score=folder / "score.json",
        picture=folder / "report.png",
        stages=("video",),
    )
    tasks = read_tasks(made.questions)
    answers = [Answer(t.question_id, t.text, t.answer, "a", "m", {}) for t in tasks]
    answers[0] = dataclasses.replace(answers[0], text="wrong")
    write_answers(made.answers, answers)
    rows = [{"step": step, "loss": 3.0 / step} for step in (1, 2, 3)]
    made.metrics("video").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def read_saved(path):
    """Two frames a second of a video that the fixture saved as an array."""
    frames = np.load(f"{path}.npy")
    return Frames(frames[::4], [number / 2 for number in range(len(frames[::4]))])


def test_the_table_shows_the_guess_that_the_questions_themselves_give(run):
    result = score(run)
    tasks = read_tasks(run.questions)
    assert (result.overall.correct, result.overall.total) == (23, 24)
    assert result.guessing("overall") == pytest.approx(best_guess(tasks), abs=1e-9)
    shown = io.StringIO()
    console = Console(file=shown, width=100)
    show(run, result, {}, 1.0, console, without=("times", "when"))
    text = shown.getvalue()
    assert f"{best_guess(tasks):.1%}" in text
    assert "without times: the most that is right knowing which digits, not when" in text


def test_a_line_of_another_question_file_is_named(tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question_id": "a", "image": "x.jpg", "text": "What?"}\n')
    with pytest.raises(DataError, match=r"questions\.jsonl:1: no question of the digits videos"):
        read_tasks(path)


@pytest.mark.parametrize(
    "overrides", [(), ("train.seed=7",), ("model.video.time_positions=true", "train.seed=7")]
)
def test_the_shipped_settings_must_reach_nine_of_ten(overrides):
    bounds = video_expectation(overrides, guess=0.3)
    bounds.check(Tally(360, 400))
    with pytest.raises(ExpectationError, match=r"359 of 400 .*reach 90%"):
        bounds.check(Tally(359, 400))


def test_without_time_positions_no_more_than_the_guess_and_five_points():
    bounds = video_expectation(("model.video.time_positions=false", "train.seed=1"), guess=0.3)
    bounds.check(Tally(140, 400))
    with pytest.raises(ExpectationError, match=r"without time positions at most 35% can be"):
        bounds.check(Tally(141, 400))
    video_expectation(("train.steps=2",), guess=0.3).check(Tally(0, 400))


def test_the_picture_shows_strips_of_every_category(run):
    draw(run, score(run), read_saved)
    with Image.open(run.picture) as image:
        image.load()
        assert image.width > 1000
        assert len(image.convert("RGB").getcolors(maxcolors=10**6)) > 100
    tasks = read_tasks(run.questions)
    assert {t.category for t in choose_examples(tasks, 8)} == {t.category for t in tasks}


def test_the_strip_of_a_file_has_the_digit_of_each_second(tmp_path):
    pytest.importorskip("av", reason="PyAV (the extra video) is not installed")
    beats = Beats((7, 0, 3, 9), (2, 0, 0, 3))
    ink = np.stack([np.full((28, 28), 60 * (beat + 1), np.uint8) for beat in range(4)])
    drawn = frames_of(beats, ink)
    write_vp9(tmp_path / "a.webm", drawn)
    frames = read_frames_of(tmp_path / "a.webm", fps=1.0)
    assert list(frames.times) == [0, 1, 2, 3]
    # Lossy, and through RGB: a frame of another second differs by more than 10 on average.
    assert np.abs(frames.pixels.astype(int) - drawn[::8]).mean(axis=(1, 2)).max() < 3


def test_a_strip_has_the_frames_side_by_side():
    frames = np.stack([np.full((2, 3), value, np.uint8) for value in (10, 20, 30)])
    row = [10] * 3 + [255] * 3 + [20] * 3 + [255] * 3 + [30] * 3
    np.testing.assert_array_equal(strip(frames), [row, row])


@pytest.fixture
def configs(tmp_path):
    """Settings of the stage, as far as a model of images alone knows them."""
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "digits_video.yaml").write_text(
        "data: {annotations: data/video_digits/video_instruct.json, template: mistral}\n"
        "train: {stage: instruct, steps: 2}\n"
    )
    return folder


def test_a_finished_model_of_the_images_is_gone_on_from(tmp_path, configs):
    done = tmp_path / "quickstart" / "instruct" / "checkpoints" / "step_00000600"
    done.mkdir(parents=True)
    (done / "dattn.json").write_text("{}")
    made = make_video_run(
        tmp_path / "run", DATA, IMAGE_DATA, image_run=tmp_path / "quickstart", configs=configs
    )
    assert [step.name for step in made.steps] == ["video-data", "video", "convert", "answer"]
    assert f"checkpoint.init_from={tmp_path / 'quickstart' / 'instruct'}" in made.steps[1].command
    assert made.stages == ("video",)


def test_without_one_the_images_are_trained_first_with_the_same_seed(tmp_path, configs):
    made = make_video_run(
        tmp_path / "run",
        tmp_path / "videos",
        IMAGE_DATA,
        overrides=("train.seed=7", "optim.lr=1e-3"),
        image_run=tmp_path / "nothing",
        configs=configs,
    )
    names = [step.name for step in made.steps]
    assert names == ["data", "align", "pretrain", "instruct", "video-data", "video", *names[-2:]]
    for step in made.steps[1:4]:
        assert "train.seed=7" in step.command
        assert "optim.lr=1e-3" not in step.command
    own = made.steps[5].command
    assert {"train.seed=7", "optim.lr=1e-3"} <= set(own)
    assert f"checkpoint.init_from={tmp_path / 'run' / 'image' / 'instruct'}" in own
    assert f"data.annotations={tmp_path / 'videos' / 'video_instruct.json'}" in own
