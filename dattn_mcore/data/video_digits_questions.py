"""What is said about a video of the digits task: questions, conversations, the best blind guess.

A video has four beats of a second. In each of them one digit stands in one cell of a 2 x 2 grid:
four different digits that appear one after the other, or one digit that moves from cell to cell.
Every question needs the time: who knows all frames but not their order can only guess, and how
often such a guess is right is counted over all orders of the same frames (`best_guess`).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from dattn_mcore.data.digits_questions import CELLS

VIDEO_MARK = "<video>"
BEATS = 4
_ORDINALS = ("first", "second", "third", "fourth")
_MOST_TURNS = 3  # questions about one video, before it is read beat by beat


@dataclass(frozen=True)
class Beats:
    """What a video shows.

    Attributes:
        digits: of each beat; all different, or one digit alone.
        cells: place of each beat's digit, an index of `CELLS`.
    """

    digits: tuple[int, ...]
    cells: tuple[int, ...]

    @property
    def moves(self) -> bool:
        """Whether one digit moves, instead of several that appear."""
        return len(set(self.digits)) == 1

    def orders(self) -> Iterator[Beats]:
        """All videos of the same frames in any order, this one among them, all equally likely.

        A frame that a video shows twice counts as two; a digit moves to a neighbouring cell only.
        """
        for order in itertools.permutations(range(len(self.digits))):
            cells = tuple(self.cells[beat] for beat in order)
            if not self.moves or all(beside(a, b) for a, b in itertools.pairwise(cells)):
                yield Beats(tuple(self.digits[beat] for beat in order), cells)


@dataclass(frozen=True)
class _Category:
    """One kind of question.

    Attributes:
        wording: with the place of what it is about.
        asked: what it can be about, in a video.
        answer: of that.
    """

    wording: str
    asked: Callable[[Beats], Sequence[Any]]
    answer: Callable[[Beats, Any], str]


@dataclass(frozen=True)
class VideoQuestion:
    """A question about a video: its category, what of it is asked, and the words."""

    category: str
    asked: Any
    text: str

    def answer(self, beats: Beats) -> str:
        """Its answer, of a video of these frames in any order."""
        return CATEGORIES[self.category].answer(beats, self.asked)

    def best_guess(self, beats: Beats) -> Fraction:
        """How often the best guess is right of one who knows the frames but not their order."""
        answers = Counter(self.answer(order) for order in beats.orders())
        return Fraction(max(answers.values()), answers.total())


def beside(cell: int, other: int) -> bool:
    """Whether two cells have a side in common."""
    return cell ^ other in (1, 2)


def _digit_at(beats: Beats, beat: int) -> str:
    return str(beats.digits[beat])


def _cell_at(beats: Beats, beat: int) -> str:
    return CELLS[beats.cells[beat]]


def _digits_of(beats: Beats) -> tuple[int, ...]:
    return beats.digits


def _beats_of(beats: Beats) -> range:
    return range(len(beats.digits))


CATEGORIES = {
    "order": _Category("Which digit came {ordinal}?", _beats_of, _digit_at),
    "second": _Category("Which digit is there at {asked}s?", _beats_of, _digit_at),
    "when": _Category(
        "When did the {asked} appear?", _digits_of, lambda b, digit: f"{b.digits.index(digit)}s"
    ),
    "list": _Category(
        "Which digits appear, in order?",
        lambda _: (None,),
        lambda b, _: " ".join(map(str, b.digits)),
    ),
    "place": _Category("Where is the digit at {asked}s?", _beats_of, _cell_at),
}
_SHARES = {"order": 0.35, "second": 0.15, "when": 0.4, "list": 0.1}


def draw_question(beats: Beats, rng: np.random.Generator) -> VideoQuestion:
    """Draws a question that the video can be asked."""
    category = "place" if beats.moves else str(rng.choice(list(_SHARES), p=list(_SHARES.values())))
    kind = CATEGORIES[category]
    possible = kind.asked(beats)
    asked = possible[int(rng.random() * len(possible))]
    ordinal = _ORDINALS[asked] if category == "order" else ""
    return VideoQuestion(category, asked, kind.wording.format(asked=asked, ordinal=ordinal))


def reading(beats: Beats, rng: np.random.Generator) -> tuple[str, str]:
    """A question and answer of training alone: all beats in random order.

    The word in front is then all that says what to look for: a second or an ordinal in front of a
    digit or place, or a digit in front of its second.
    """
    order = [int(beat) for beat in rng.permutation(len(beats.digits))]
    seconds = [f"{beat}s" for beat in order]
    ordinals = [_ORDINALS[beat] for beat in order]
    if beats.moves:
        return "Read the places.", _pairs(seconds, [_cell_at(beats, beat) for beat in order])
    digits = [_digit_at(beats, beat) for beat in order]
    form = int(rng.integers(3))
    if form == 0:
        return "Read the digits.", _pairs(seconds, digits)
    if form == 1:
        return "Read the digits.", _pairs(ordinals, digits)
    return "When did the digits appear?", _pairs(digits, seconds)


def _pairs(first: Sequence[str], second: Sequence[str]) -> str:
    return " ".join(f"{a} {b}" for a, b in zip(first, second, strict=True))


def conversation(name: str, path: str, beats: Beats, rng: np.random.Generator) -> dict[str, Any]:
    """A training record: one video, one to four questions."""
    questions = [draw_question(beats, rng) for _ in range(1 + int(rng.integers(_MOST_TURNS)))]
    turns = [(question.text, question.answer(beats)) for question in questions]
    turns.append(reading(beats, rng))  # last: what it says must not stand before a question
    return _record(name, path, turns)


def held_out_question(
    name: str, path: str, beats: Beats, rng: np.random.Generator
) -> dict[str, Any]:
    """A question of the held-out part, with its answer and the best guess without the time."""
    question = draw_question(beats, rng)
    return {
        "question_id": name,
        "video": path,
        "text": question.text,
        "category": question.category,
        "answer": question.answer(beats),
        "guess": float(question.best_guess(beats)),
    }


def as_record(question: dict[str, Any]) -> dict[str, Any]:
    """A question of the held-out part as a conversation, for the held-out loss."""
    turns = [(question["text"], question["answer"])]
    return _record(question["question_id"], question["video"], turns)


def _record(name: str, path: str, turns: Sequence[tuple[str, str]]) -> dict[str, Any]:
    marked = [(f"{VIDEO_MARK}\n{turns[0][0]}", turns[0][1]), *turns[1:]]
    return {
        "id": name,
        "video": path,
        "conversations": [
            {"from": speaker, "value": value}
            for question, answer in marked
            for speaker, value in (("human", question), ("gpt", answer))
        ],
    }
