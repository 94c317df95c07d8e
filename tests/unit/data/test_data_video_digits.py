"""The digits videos: what is asked, what a guess without the time is worth, what is drawn."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from dattn_mcore.data import video_digits
from dattn_mcore.data.digits_questions import CELLS, all_texts
from dattn_mcore.data.tokenizer import load_tokenizer, train_tokenizer
from dattn_mcore.data.video_digits import (
    FRAME_RATE,
    VideoDigitsSizes,
    frames_of,
    prepare_video_digits,
)
from dattn_mcore.data.video_digits_questions import (
    CATEGORIES,
    Beats,
    VideoQuestion,
    conversation,
    draw_question,
    reading,
)
from dattn_mcore.data.video_digits_words import WORDS, write_tokenizer
from dattn_mcore.errors import DataError

APPEAR = Beats((7, 0, 3, 9), (2, 0, 0, 3))
MOVE = Beats((5, 5, 5, 5), (0, 1, 3, 1))


@pytest.mark.parametrize(
    ("category", "asked", "answer", "guess"),
    [
        ("order", 2, "3", Fraction(1, 4)),
        ("second", 0, "7", Fraction(1, 4)),
        ("when", 9, "3s", Fraction(1, 4)),
        ("list", None, "7 0 3 9", Fraction(1, 24)),
    ],
)
def test_an_answer_and_the_best_guess_without_the_order(category, asked, answer, guess):
    question = VideoQuestion(category, asked, "")
    assert question.answer(APPEAR) == answer
    assert question.best_guess(APPEAR) == guess


def test_the_guess_about_a_digit_that_moves_counts_the_ways_it_can_have_gone():
    # Frames in 0, 1, 3 and again 1. Every step goes to a neighbour, so the two frames in 1 stand
    # at even seconds or at odd ones: 1 0 1 3, 1 3 1 0, 0 1 3 1, 3 1 0 1. At each second two of the
    # four have the digit in 1.
    for second, answer in enumerate(("top-left", "top-right", "bottom-right", "top-right")):
        question = VideoQuestion("place", second, "")
        assert question.answer(MOVE) == answer
        assert question.best_guess(MOVE) == Fraction(1, 2)


def test_no_strategy_that_sees_the_frames_without_order_beats_the_guess():
    """The definition by brute force: over all videos of a kind, the best answer to each sight."""
    walks = [
        Beats((4,) * 4, cells)
        for cells in itertools.product(range(4), repeat=4)
        if all(a ^ b in (1, 2) for a, b in itertools.pairwise(cells))
    ]
    assert len(walks) == 4 * 2**3
    question = VideoQuestion("place", 1, "")
    of_sight: dict[tuple[int, ...], Counter[str | None]] = {}
    for beats in walks:
        of_sight.setdefault(tuple(sorted(beats.cells)), Counter())[question.answer(beats)] += 1
    best = sum(max(answers.values()) for answers in of_sight.values())
    guessed = sum(question.best_guess(beats) for beats in walks)
    assert guessed == best


def test_drawn_questions_have_the_answer_that_the_words_ask_for():
    rng = np.random.default_rng(0)
    seen = Counter()
    ordinals = {"first": 0, "second": 1, "third": 2, "fourth": 3}
    for _ in range(300):
        question = draw_question(APPEAR, rng)
        words = question.text.rstrip("?").split()
        answer = question.answer(APPEAR)
        seen[question.category] += 1
        if question.category == "order":
            assert answer == str(APPEAR.digits[ordinals[words[-1]]])
        elif question.category == "second":
            assert answer == str(APPEAR.digits[int(words[-1][0])])
        elif question.category == "when":
            assert answer == f"{APPEAR.digits.index(int(words[-2]))}s"
    assert set(seen) == set(CATEGORIES) - {"place"}
    question = draw_question(MOVE, rng)
    assert question.text == f"Where is the digit at {question.asked}s?"
    assert question.answer(MOVE) == CELLS[MOVE.cells[question.asked]]


def test_a_conversation_marks_its_video_once_and_a_reading_names_every_second():
    rng = np.random.default_rng(1)
    record = conversation("v", "train/00/00000.webm", APPEAR, rng)
    said = [turn["value"] for turn in record["conversations"]]
    assert record["video"] == "train/00/00000.webm"
    assert said[0].startswith("<video>\n")
    assert sum(value.count("<video>") for value in said) == 1
    assert len(said) % 2 == 0
    forms = set()
    for _ in range(30):
        text, answer = reading(APPEAR, rng)
        words = answer.split()
        if text.startswith("When"):
            told = {second: digit for digit, second in zip(words[::2], words[1::2], strict=True)}
        else:
            told = dict(zip(words[::2], words[1::2], strict=True))
        forms.add((text, tuple(sorted(told))))
        assert [told[word] for word in sorted(told)] in (["7", "0", "3", "9"], ["7", "9", "0", "3"])
    assert len(forms) == 3  # by second, by ordinal (first, fourth, second, third), by digit


def test_frames_show_the_digit_of_each_second_in_its_cell():
    ink = np.stack([np.full((28, 28), 50 * (beat + 1), np.uint8) for beat in range(4)])
    frames = frames_of(APPEAR, ink)
    assert frames.shape == (4 * FRAME_RATE, 56, 56)
    for beat, cell in enumerate(APPEAR.cells):
        row, column = 28 * (cell // 2), 28 * (cell % 2)
        for half in (0, FRAME_RATE // 2):  # what two frames a second are taken from
            expected = np.zeros((56, 56), np.uint8)
            expected[row : row + 28, column : column + 28] = 50 * (beat + 1)
            np.testing.assert_array_equal(frames[beat * FRAME_RATE + half], expected)
        assert not frames[beat * FRAME_RATE + 7].any()


def test_a_moving_digit_goes_all_the_way_to_its_next_cell():
    frames = frames_of(MOVE, np.full((4, 28, 28), 200, np.uint8))
    # From the left to the right in the first second: 28 pixels, between frame 4 and frame 8.
    starts = [int(np.flatnonzero(frame.any(axis=0))[0]) for frame in frames[:9]]
    assert starts == [0, 0, 0, 0, 0, 7, 14, 21, 28]
    assert all(frame.any() for frame in frames)


def test_the_tokenizer_keeps_the_ids_of_the_images_and_has_whole_words_of_time(tmp_path):
    texts = sorted(set(all_texts()))
    train_tokenizer(all_texts(), tmp_path / "images.model", 384)
    write_tokenizer(tmp_path / "images.model", tmp_path / "tokenizer.model", texts)
    images = load_tokenizer(tmp_path / "images.model")
    videos = load_tokenizer(tmp_path / "tokenizer.model")
    assert videos.vocab_size == images.vocab_size
    for text in texts:
        assert videos.encode(text) == images.encode(text)
    for word in WORDS:
        text = word.replace("\u2581", " ")
        assert len(videos.encode(text)) == 1, word
        assert videos.decode(videos.encode(f"Which{text}")) == f"Which{text}"
    letters = sorted({letter for text in texts for letter in text})
    pairs = ["".join(pair) for pair in itertools.product(letters, repeat=2)]
    with pytest.raises(DataError, match="no spare piece for"):
        write_tokenizer(tmp_path / "images.model", tmp_path / "again.model", pairs)


def test_prepared_once_with_other_hands_for_training_and_evaluation(tmp_path, monkeypatch):
    written: dict[str, np.ndarray] = {}
    monkeypatch.setattr(
        video_digits,
        "write_vp9",
        lambda path, frames: written.update({f"{path.parts[-3]}{path.name}": frames}),
    )
    sizes = VideoDigitsSizes(train=12, heldout=8)
    folder = prepare_video_digits(tmp_path / "videos", sizes)
    assert len(written) == 20
    assert prepare_video_digits(folder, sizes) == folder
    assert len(written) == 20
    questions = [json.loads(x) for x in (folder / "heldout_questions.jsonl").open()]
    records = json.loads((folder / "heldout_video_instruct.json").read_text())
    assert [q["video"] for q in questions] == [r["video"] for r in records]
    assert {q["category"] for q in questions} >= {"place"}
    assert all(0 < q["guess"] <= 1 for q in questions)
    assert len(json.loads((folder / "video_instruct.json").read_text())) == 12
    again = {}
    monkeypatch.setattr(
        video_digits,
        "write_vp9",
        lambda path, frames: again.update({f"{path.parts[-3]}{path.name}": frames}),
    )
    prepare_video_digits(tmp_path / "again", sizes)
    assert written.keys() == again.keys()
    for name, frames in written.items():
        np.testing.assert_array_equal(frames, again[name])
