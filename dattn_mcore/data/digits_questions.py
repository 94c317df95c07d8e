"""What is said about a mosaic of the digits task: captions, questions, conversations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dattn_mcore.types import IMAGE_MARK

CELLS = ("top-left", "top-right", "bottom-left", "bottom-right")  # reading order
_CELL_WORDINGS = ("Which digit is in the {cell} cell?", "Which digit is {cell}?")
_LINE_WORDING = "Which digits are in the {line}?"
_LINES = {"top row": (0, 1), "bottom row": (2, 3), "left column": (0, 2), "right column": (1, 3)}
_BESIDE_WORDING = "Which digit is {place} the {cell} cell?"
_BESIDE = tuple(  # (place, cell it is seen from, cell meant)
    (place, cell, cell ^ flip)
    for place, cells, flip in (
        ("right of", (0, 2), 1),
        ("left of", (1, 3), 1),
        ("below", (0, 1), 2),
        ("above", (2, 3), 2),
    )
    for cell in cells
)
_MOST_TURNS = 4  # questions about one picture
_CATEGORIES = {  # share of the questions, best accuracy of one who sees the bag of digits only
    "cell": (0.6, 1 / 4),
    "beside": (0.15, 1 / 4),
    "line": (0.25, 1 / 12),  # an ordered pair of four different digits
}


@dataclass(frozen=True)
class Mosaic:
    """A 2 x 2 mosaic: its file, relative to the image folder, and its digits in reading order."""

    path: str
    digits: tuple[int, int, int, int]


def bag_of_digits_ceiling(category: str) -> float:
    """Returns the best accuracy without any sense of place, knowing the four digits exactly.

    All arrangements of the four digits are equally likely, so one of four is right where one
    digit is asked for, and one of twelve where two are asked for in order.
    """
    return _CATEGORIES[category][1]


def caption(stage: str, number: int, mosaic: Mosaic) -> dict[str, Any]:
    """Makes an image-caption record; the caption reads the digits in order."""
    caption = " ".join(str(digit) for digit in mosaic.digits)
    return _record(
        f"{stage}-{number:05d}", mosaic.path, [(f"{IMAGE_MARK}\nRead the digits.", caption)]
    )


def caption_with_places(
    stage: str, number: int, mosaic: Mosaic, rng: np.random.Generator
) -> dict[str, Any]:
    """Makes an image-caption record that names each digit's place, in random order.

    The word in front of a digit is then all that says where to look, as no count of digits can.
    """
    order = rng.permutation(len(CELLS))
    caption = " ".join(f"{CELLS[cell]} {mosaic.digits[cell]}" for cell in order)
    return _record(
        f"{stage}-{number:05d}", mosaic.path, [(f"{IMAGE_MARK}\nRead the places.", caption)]
    )


def conversation(number: int, mosaics: Sequence[Mosaic], rng: np.random.Generator) -> dict:
    """Makes an instruct record: mostly one image and one to four questions; some of every kind."""
    name = f"instruct-{number:05d}"
    mosaic = mosaics[number]
    draw = rng.random()
    if draw < 0.02:
        digit = int(rng.integers(9))
        return _record(name, None, [(f"Which digit is after {digit}?", str(digit + 1))])
    if draw < 0.04:
        # Two pictures of one mosaic: visual rows carry no order between images, so a question
        # must have the same answer in both.
        question, answer, _ = _question(mosaic, rng)
        return _record(
            name, [mosaic.path, mosaic.path], [(f"{IMAGE_MARK}\n{IMAGE_MARK}\n{question}", answer)]
        )
    turns = []
    for turn in range(1 + int(rng.integers(_MOST_TURNS))):
        question, answer, _ = _question(mosaic, rng)
        turns.append((f"{IMAGE_MARK}\n{question}" if turn == 0 else question, answer))
    return _record(name, mosaic.path, turns)


def _question(mosaic: Mosaic, rng: np.random.Generator) -> tuple[str, str, str]:
    """Draws a question about a mosaic. Returns question, answer, category."""
    category = str(rng.choice(list(_CATEGORIES), p=[share for share, _ in _CATEGORIES.values()]))
    draw = rng.random()
    if category == "line":
        line = list(_LINES)[int(draw * len(_LINES))]
        answer = " ".join(str(mosaic.digits[cell]) for cell in _LINES[line])
        return _LINE_WORDING.format(line=line), answer, category
    if category == "beside":
        place, seen_from, cell = _BESIDE[int(draw * len(_BESIDE))]
        text = _BESIDE_WORDING.format(place=place, cell=CELLS[seen_from])
        return text, str(mosaic.digits[cell]), category
    cell = int(draw * len(CELLS))
    wording = _CELL_WORDINGS[int(rng.random() * len(_CELL_WORDINGS))]
    return wording.format(cell=CELLS[cell]), str(mosaic.digits[cell]), category


def held_out_question(number: int, mosaic: Mosaic, rng: np.random.Generator) -> dict[str, Any]:
    """Makes a question of the held-out part, with its answer."""
    text, answer, category = _question(mosaic, rng)
    return {
        "question_id": f"heldout-{number:04d}",
        "image": mosaic.path,
        "text": text,
        "category": category,
        "answer": answer,
    }


def as_record(question: dict[str, Any]) -> dict[str, Any]:
    """A question of the held-out part as a conversation, for the held-out loss."""
    turn = (f"{IMAGE_MARK}\n{question['text']}", question["answer"])
    return _record(question["question_id"], question["image"], [turn])


def _record(name: str, image: str | list[str] | None, turns: list[tuple[str, str]]) -> dict:
    record: dict[str, Any] = {"id": name}
    if image is not None:
        record["image"] = image
    record["conversations"] = [
        {"from": speaker, "value": value}
        for question, answer in turns
        for speaker, value in (("human", question), ("gpt", answer))
    ]
    return record


def all_texts() -> list[str]:
    """Every wording, about as often as it is drawn, for the tokenizer.

    So the tokenizer is the same for every size and seed of the data set.
    """
    texts = [text.format(cell=cell) for text in _CELL_WORDINGS for cell in CELLS] * 8
    texts += [_LINE_WORDING.format(line=line) for line in _LINES] * 6
    texts += [_BESIDE_WORDING.format(place=place, cell=CELLS[cell]) for place, cell, _ in _BESIDE]
    return texts + [f"Which digit is after {digit}?" for digit in range(10)]
