"""The embedded data set: what is in it, that it repeats, and that it can only be made whole."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn import datasets

from dattn_mcore.config.load import from_dict
from dattn_mcore.data import digits
from dattn_mcore.data.__main__ import main
from dattn_mcore.data.digits import DigitsSizes, prepare_configured, prepare_digits
from dattn_mcore.data.digits_drawing import draw_cells, load_digits
from dattn_mcore.data.digits_questions import CELLS, bag_of_digits_ceiling
from dattn_mcore.data.tokenizer import load_tokenizer
from dattn_mcore.errors import DataError
from tests.unit.data.read_json import read_json

SIZES = DigitsSizes(align=40, pretrain=60, instruct=300, heldout=200)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set."""
    return prepare_digits(tmp_path_factory.mktemp("digits") / "digits", SIZES)


def _contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def test_same_sizes_same_bytes(prepared: Path, tmp_path: Path) -> None:
    assert _contents(prepare_digits(tmp_path / "again", SIZES)) == _contents(prepared)


def test_another_seed_another_set(prepared: Path, tmp_path: Path) -> None:
    sizes = DigitsSizes(align=40, pretrain=60, instruct=300, heldout=200, seed=1)
    other = _contents(prepare_digits(tmp_path / "other", sizes))
    mine = _contents(prepared)
    assert other["align.json"] != mine["align.json"]
    assert other["tokenizer.model"] == mine["tokenizer.model"]


def test_annotations_read_and_point_at_images(prepared: Path) -> None:
    counts = {"align": 40, "pretrain": 60, "instruct": 300}
    kinds: Counter[int] = Counter()
    for name, count in counts.items():
        samples = read_json(prepared / f"{name}.json")
        assert len(samples) == count
        for sample in samples:
            kinds[len(sample.images)] += 1
            for path in sample.images:
                assert path.startswith("align/" if name == "align" else "train/")
                with Image.open(prepared / "images" / path) as image:
                    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (56, 56))
    assert kinds[0] > 0
    assert kinds[2] > 0
    assert kinds[1] > 0.9 * sum(kinds.values())


def test_a_picture_of_the_first_stage_shows_one_digit(prepared: Path) -> None:
    """By four hands; the first stage is about what a digit is, and all ten are in it."""
    captions = [sample.turns[1] for sample in read_json(prepared / "align.json")]
    assert {caption.split()[0] for caption in captions} == set("0123456789")
    assert all(caption == " ".join(caption.split()[:1] * 4) for caption in captions)
    for path in (prepared / "images" / "align").rglob("*.jpg"):
        cells = np.asarray(Image.open(path).convert("L")).reshape(2, 28, 2, 28).swapaxes(1, 2)
        assert len({cell.tobytes() for cell in cells.reshape(4, -1)}) == 4


def test_places_in_captions_come_in_every_order(prepared: Path) -> None:
    """In one order a model could count digits in place of reading the words."""
    samples = read_json(prepared / "pretrain.json")[1::2]
    assert len({tuple(sample.turns[1].split()[::2]) for sample in samples}) > 12


def test_captions_and_answers_agree(prepared: Path) -> None:
    truth = {}
    for number, sample in enumerate(read_json(prepared / "pretrain.json")):
        words = sample.turns[1].split()
        if number % 2:
            assert sorted(words[::2]) == sorted(CELLS)
            words = [dict(zip(words[::2], words[1::2], strict=True))[cell] for cell in CELLS]
        truth[sample.images[0]] = words
    checked: Counter[str] = Counter()
    for sample in read_json(prepared / "instruct.json"):
        shown = truth.get(sample.images[0]) if sample.images else None
        if shown is None:
            continue
        assert len(set(shown)) == 4
        for asked, answer in zip(sample.turns[::2], sample.turns[1::2], strict=True):
            checked[_check_answer(asked.replace("<image>", "").strip(), answer, shown)] += 1
    assert set(checked) == {"cell", "beside", "line"}


def _check_answer(question: str, answer: str, shown: list[str]) -> str:
    """Works the answer out anew from the question's words; returns the kind of question."""
    lines = {"top row": (0, 1), "bottom row": (2, 3), "left column": (0, 2), "right column": (1, 3)}
    for line, cells in lines.items():
        if line in question:
            assert answer.split() == [shown[cell] for cell in cells]
            return "line"
    (named,) = (number for number, cell in enumerate(CELLS) if cell in question)
    row, column = divmod(named, 2)
    steps = {"right of": (0, 1), "left of": (0, -1), "below": (1, 0), "above": (-1, 0)}
    for place, (down, right) in steps.items():
        if place in question:
            assert 0 <= row + down <= 1
            assert 0 <= column + right <= 1
            assert shown[2 * (row + down) + column + right] == answer
            return "beside"
    assert shown[named] == answer
    return "cell"


def test_held_out_questions(prepared: Path) -> None:
    lines = (prepared / "heldout_questions.jsonl").read_text().splitlines()
    questions = [json.loads(line) for line in lines]
    assert len({question["question_id"] for question in questions}) == len(questions) == 200
    for question in questions:
        assert set(question) == {"question_id", "image", "text", "category", "answer"}
        assert question["image"].startswith("heldout/")
        assert (prepared / "images" / question["image"]).is_file()
        assert "<image>" not in question["text"]
        wanted = 2 if question["category"] == "line" else 1
        assert len(set(question["answer"].split())) == wanted
        assert set(question["answer"].split()) <= set("0123456789")
    categories = Counter(question["category"] for question in questions)
    assert set(categories) == {"cell", "beside", "line"}
    # Who sees the digits but not their places stays far under one half.
    guessed = sum(count * bag_of_digits_ceiling(name) for name, count in categories.items())
    assert guessed / len(questions) <= 0.25
    assert max(Counter(question["answer"] for question in questions).values()) <= 0.25 * 200


def test_held_out_digits_are_in_no_training_mosaic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made from digits that are blank where they are held out, and all ink elsewhere."""
    images, labels = datasets.load_digits(return_X_y=True)
    held_out = round(0.2 * len(labels))
    marked = np.full_like(images, 16)
    marked[:held_out] = 0
    monkeypatch.setattr(datasets, "load_digits", lambda return_X_y: (marked, labels))
    folder = prepare_digits(tmp_path / "made", SIZES)
    counts = {"align": SIZES.align, "train": SIZES.instruct, "heldout": SIZES.heldout}
    for split, count in counts.items():
        paths = list((folder / "images" / split).rglob("*.jpg"))
        assert len(paths) == count
        for path in paths:
            cells = np.asarray(Image.open(path).convert("L")).reshape(2, 28, 2, 28)
            ink = cells.mean((1, 3))
            assert (ink < 5 if split == "heldout" else ink > 150).all(), path
    assert set(np.unique(labels[:held_out])) == set(range(10))


def test_mosaics_show_what_the_caption_says() -> None:
    # A held-out cell, shrunk again, is the digit it was made from.
    images, labels = load_digits()
    chosen = np.array([3, 100, 500])
    cells = draw_cells(images, chosen, np.random.default_rng(0), vary=False)
    for cell, index in zip(cells, chosen, strict=True):
        small = np.asarray(Image.fromarray(cell).resize((8, 8), Image.Resampling.BOX)) / 255
        errors = np.abs(images - small).mean((1, 2))
        assert labels[errors.argmin()] == labels[index]
        assert errors[index] < 0.1


def test_tokenizer_knows_every_word_in_few_ids(prepared: Path) -> None:
    tokenizer = load_tokenizer(prepared / "tokenizer.model")
    assert tokenizer.vocab_size <= 384
    for sample in read_json(prepared / "instruct.json"):
        for turn in sample.turns:
            text = turn.replace("<image>", "")
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            assert min(ids, default=8) >= 8
            assert len(ids) <= 13


def test_words_are_not_cut_to_pieces(prepared: Path) -> None:
    """The place asked for stands in two words; spelled in letters it takes far longer to learn."""
    tokenizer = load_tokenizer(prepared / "tokenizer.model")
    for word in ("top", "bottom", "left", "right", "row", "column", "cell", "digit", "above"):
        assert len(tokenizer.encode(f"Which {word}")) == 2, word
    for cell in CELLS:
        assert len(tokenizer.encode(f" {cell}")) == 3, cell


def test_prepared_folder_is_left_alone(prepared: Path) -> None:
    before = (prepared / "align.json").stat().st_mtime_ns
    prepare_digits(prepared, SIZES)
    assert (prepared / "align.json").stat().st_mtime_ns == before


def test_an_older_version_is_replaced(tmp_path: Path) -> None:
    small = DigitsSizes(align=2, pretrain=2, instruct=2, heldout=2)
    folder = prepare_digits(tmp_path / "digits", small)
    (folder / "prepared.json").write_text('{"version": 0}')
    (folder / "stale.txt").write_text("old")
    prepare_digits(folder, small)
    assert not (folder / "stale.txt").exists()
    assert json.loads((folder / "prepared.json").read_text())["version"] == digits._VERSION
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_a_killed_run_leaves_no_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    small = DigitsSizes(align=2, pretrain=2, instruct=2, heldout=2)
    with monkeypatch.context() as patch:
        patch.setattr(digits, "train_tokenizer", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare_digits(tmp_path / "digits", small)
    assert list(tmp_path.iterdir()) == []
    assert (prepare_digits(tmp_path / "digits", small) / "prepared.json").exists()


def test_a_rival_that_was_faster_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = DigitsSizes(align=2, pretrain=2, instruct=2, heldout=2)
    train = digits.train_tokenizer

    def after_a_rival(*args: Any) -> None:
        monkeypatch.setattr(digits, "train_tokenizer", train)
        prepare_digits(tmp_path / "digits", small)
        (tmp_path / "digits" / "first").write_text("x")
        train(*args)

    monkeypatch.setattr(digits, "train_tokenizer", after_a_rival)
    prepare_digits(tmp_path / "digits", small)
    assert (tmp_path / "digits" / "first").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_a_folder_of_something_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(DataError, match="holds something else than the digits data set"):
        prepare_digits(tmp_path, SIZES)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    assert main(["prepare-digits", "--output", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    made = []
    monkeypatch.setattr(
        "dattn_mcore.data.digits.prepare_digits",
        lambda output, sizes: made.append((output, sizes)) or output,
    )
    assert main(["prepare-digits", "--output", "x", "--seed", "3"]) == 0
    assert made == [("x", DigitsSizes(seed=3))]


@pytest.mark.parametrize(
    "data", [{"annotations": "mine.json"}, {"prepare": "none"}, {"sources": [{"weight": 1.0}]}]
)
def test_only_the_embedded_data_set_is_made(tmp_path, data):
    """A wrong name in data.annotations makes nothing in the user's folder."""
    annotations = tmp_path / "digits" / data.pop("annotations", "align.json")
    prepare_configured(from_dict({"data": {"annotations": str(annotations), **data}}))
    assert not (tmp_path / "digits").exists()
