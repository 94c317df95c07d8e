"""Question and answer files: JSON lines in LLaVA's form, checked line by line.

Question: {question_id, image (absent, one path, or a list), text, category?, answer?}.
Answer: {question_id, prompt, text, answer_id, model_id, metadata}.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dattn_mcore.errors import DataError
from dattn_mcore.evaluation.files import read_json_lines, write_json_lines
from dattn_mcore.evaluation.subset import Item, subset
from dattn_mcore.types import IMAGE_MARK


def mark_images(text: str, images: int) -> str:
    """The text with one `<image>` per image; where there is none, they go in front."""
    return f"{IMAGE_MARK}\n" * images + text if images and IMAGE_MARK not in text else text


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        question_id: text or number, unique in its file.
        images: paths below the image folder, in the order of their marks.
        text: what is asked, as in the file.
        category: group for the score; empty if the file has none.
        answer: expected answer, if the file has it.
        line: line number in the file, from 1.
    """

    question_id: str | int
    images: tuple[str, ...]
    text: str
    category: str
    answer: str | None
    line: int

    @property
    def marked_text(self) -> str:
        """The text with one `<image>` per image; marks that are not there go in front."""
        return mark_images(self.text, len(self.images))


@dataclass(frozen=True)
class Answer:
    """One answer, with the fields and names of LLaVA's answer files."""

    question_id: str | int
    prompt: str
    text: str
    answer_id: str
    model_id: str
    metadata: dict[str, Any]


def read_questions(path: str | Path) -> list[Question]:
    """Reads a question file.

    Raises:
        DataError: the file is missing or empty, or a line (named) is malformed, lacks a field,
            repeats a question id, or has other marks than images.
    """
    questions: list[Question] = []
    seen: dict[str | int, int] = {}
    for number, record in read_json_lines(Path(path), "--questions"):
        where = f"{path}:{number}"
        question_id = _question_id(record, where)
        if question_id in seen:
            raise DataError(
                f"{where}: question_id {question_id!r} stands in line {seen[question_id]} already; "
                "ids must be unique"
            )
        seen[question_id] = number
        question = Question(
            question_id=question_id,
            images=_images(record.get("image"), where),
            text=_text(record, "text", where),
            category=str(record.get("category") or ""),
            answer=None if record.get("answer") is None else str(record["answer"]),
            line=number,
        )
        marks = question.marked_text.count(IMAGE_MARK)
        if marks != len(question.images):
            raise DataError(
                f"{where}: text has {marks} {IMAGE_MARK} but the question has "
                f"{len(question.images)} images; write one mark per image, or none at all"
            )
        questions.append(question)
    if not questions:
        raise DataError(f"{path} holds no questions; write one JSON object a line")
    return questions


def part_of(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """So many questions at most, the same ones each time; see `subset`."""
    items = [Item(f"{q.question_id}\n{q.text}", q.category) for q in questions]
    return [questions[place] for place in subset(items, limit)]


def read_answers(path: str | Path) -> dict[str | int, str]:
    """Reads an answer file.

    Returns:
        Answer text by question id.

    Raises:
        DataError: the file is missing, or a line (named) is malformed, lacks a field or repeats
            a question id.
    """
    answers: dict[str | int, str] = {}
    for number, record in read_json_lines(Path(path), "--answers"):
        where = f"{path}:{number}"
        question_id = _question_id(record, where)
        if question_id in answers:
            raise DataError(f"{where}: question_id {question_id!r} is answered twice")
        answers[question_id] = _text(record, "text", where)
    return answers


def write_answers(path: str | Path, answers: Sequence[Answer]) -> None:
    """Writes an answer file; it appears under its name when whole.

    Raises:
        DataError: it cannot be written.
    """
    write_json_lines(Path(path), [asdict(answer) for answer in answers], "--answers")


def _question_id(record: dict[str, Any], where: str) -> str | int:
    question_id = record.get("question_id")
    if isinstance(question_id, bool) or not isinstance(question_id, str | int):
        raise DataError(f"{where}: question_id is {question_id!r}; it must be text or a number")
    return question_id


def _text(record: dict[str, Any], field: str, where: str) -> str:
    value = record.get(field)
    if not isinstance(value, str):
        raise DataError(f"{where}: {field} is {value!r}; it must be text")
    return value


def _images(value: Any, where: str) -> tuple[str, ...]:
    images = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise DataError(
            f"{where}: image is {value!r}; it must be a path, a list of paths or absent"
        )
    return tuple(images)
