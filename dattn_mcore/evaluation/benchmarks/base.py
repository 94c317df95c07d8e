"""The interface of a benchmark: load rows, build prompts, read answers, score or submit."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from dattn_mcore.errors import ConfigError, DataError
from dattn_mcore.evaluation.files import read_json_lines, write_text
from dattn_mcore.evaluation.images import Picture
from dattn_mcore.evaluation.questions import mark_images
from dattn_mcore.evaluation.scores import Score
from dattn_mcore.evaluation.subset import Item, subset
from dattn_mcore.types import IMAGE_MARK


@dataclass(frozen=True)
class Options:
    """What can be chosen about scoring.

    Attributes:
        as_original: score the original's way where it is wrong: LLaVA-Bench averages failed
            judgements in, POPE joins labels by position.
        lenient_letters: SEED-Bench and ScienceQA also take `A.` or `(A) text` for A.
        textvqa_ocr: leave the reference OCR tokens in TextVQA's prompts.
        seed_images_only: leave out SEED-Bench's video rows.
        limit: ask so many rows at most, chosen by `subset`; None: all.
    """

    as_original: bool = False
    lenient_letters: bool = False
    textvqa_ocr: bool = True
    seed_images_only: bool = False
    limit: int | None = None


@dataclass(frozen=True)
class Row:
    """One question.

    Attributes:
        question_id: as in the question file; not always unique.
        prompt: the question, as LLaVA saves it with the answer.
        pictures: its images.
        category: group for the score; empty if there is none.
        suffix: what is asked after the prompt and not saved.
        extra: further fields of the answer line.
    """

    question_id: str | int
    prompt: str
    pictures: tuple[Picture, ...]
    category: str = ""
    suffix: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """What the model is asked, with one `<image>` per picture."""
        return mark_images(self.prompt + self.suffix, len(self.pictures))


class Benchmark(ABC):
    """One benchmark over its folder of data.

    Args:
        data: folder that holds the folders of all benchmarks.
        options: choices about scoring.

    Attributes:
        answered_prompts: what an answer file says it was asked, by row; empty where the rows of
            this benchmark were asked, or the file does not say.
    """

    name: ClassVar[str]  # on the command line
    title: ClassVar[str]
    folder: ClassVar[str]  # below the data folder
    full_rows: ClassVar[int]  # rows of the released question file
    unique_ids: ClassVar[bool] = True  # no two rows of the released file have one id
    max_new_tokens: ClassVar[int] = 128
    scores: ClassVar[bool] = False  # from files on this machine
    judged: ClassVar[bool] = False  # by a GPT judge
    submits: ClassVar[bool] = False  # has a file for a server or an official tool

    def __init__(self, data: str | Path, options: Options | None = None) -> None:
        self.root = Path(data) / self.folder
        self.options = options or Options()
        self.answered_prompts: dict[int, str] = {}

    @cached_property
    def rows(self) -> list[Row]:
        """The questions that are asked, in the order of the question file.

        Raises:
            DataError: a file is missing or malformed.
        """
        return [self.all_rows[number] for number in self.chosen]

    @cached_property
    def chosen(self) -> list[int]:
        """Which rows are asked: all, or the part that the option `limit` leaves."""
        items = [
            Item(str(self.join_key(row.question_id, row.prompt)), row.category, self.together(row))
            for row in self.all_rows
        ]
        return subset(items, self.options.limit)

    def together(self, row: Row) -> Hashable:
        """What a row shares with those that it must be scored with; None: it stands alone."""
        return None

    @cached_property
    def all_rows(self) -> list[Row]:
        """All questions, in the order of the question file.

        Raises:
            DataError: a file is missing or malformed.
        """
        if not self.root.is_dir():
            raise DataError(f"{self.root} is no folder; put the files of {self.title} there")
        rows = self.load_rows()
        if not rows:
            raise DataError(f"{self.root}: the question file of {self.title} holds no rows")
        for row in rows:
            marks = row.text.count(IMAGE_MARK)
            if marks != len(row.pictures):
                raise DataError(
                    f"{self.title}: question {row.question_id!r} has {marks} {IMAGE_MARK} but "
                    f"{len(row.pictures)} images"
                )
        return rows

    @abstractmethod
    def load_rows(self) -> list[Row]:
        """Reads the question file."""

    @abstractmethod
    def required(self) -> list[str]:
        """Files and folders below the benchmark's folder that asking and scoring need."""

    def join_key(self, question_id: str | int, prompt: str) -> Hashable:
        """What identifies a row, or an answer, of LLaVA's files; numbers may be text in one."""
        return str(question_id)

    @property
    def released_rows(self) -> int:
        """Rows of the released question file; 0: unknown."""
        return self.full_rows

    def file_rows(self) -> int:
        """Rows of the question file that is there, also of those that are not asked."""
        return len(self.all_rows)

    def coverage(self) -> list[str]:
        """Notes where a score is over other rows than those of the released question file."""
        count, full = self.file_rows(), self.released_rows
        notes = [f"{count} rows; the released file has {full}"] if full not in (0, count) else []
        if len(self.rows) < len(self.all_rows):
            notes.append(f"a part: {len(self.rows)} of {len(self.all_rows)} rows are asked")
        return notes + repeated(self)

    def asked_with(self) -> dict[str, str]:
        """What else answers depend on, beside rows and decoding; saved with each answer."""
        return {}

    def left_out(self) -> set[Hashable]:
        """Join keys of rows that the options leave out; answers to them are passed over."""
        return set()

    def images_hint(self, missing: Sequence[str]) -> str:
        """What to do where these images are not there, to be added to a message; mostly nothing."""
        return ""

    def truths(self) -> Sequence[Any]:
        """What scoring needs to know about each row; nothing where a server scores.

        Raises:
            DataError: it is missing, or does not fit the questions.
        """
        return []

    def check_truth(self) -> list[str]:
        """Reads what scoring and submitting need; returns what is unusual about it.

        Raises:
            DataError: it is missing, or does not fit the questions.
        """
        self.truths()
        return []

    def unscored(self) -> str:
        """Why these files cannot be scored here, where a benchmark can be in principle."""
        return ""

    def score(self, answers: Sequence[str | None]) -> Score:
        """Scores answers.

        Args:
            answers: text for each row, None where there is none (which is wrong).

        Raises:
            DataError: what scoring needs is missing.
        """
        raise ConfigError(f"{self.title} is scored by its server; use submit")

    def submit(self, answers: Sequence[str | None], folder: Path, name: str) -> Path:
        """Writes what the server or the official tool takes.

        Args:
            answers: text for each row, None where there is none.
            folder: where to write.
            name: name of the run or model.

        Raises:
            DataError: an answer that must be there is missing.
        """
        raise ConfigError(f"{self.title} is scored here, it has no submission; use score")

    def image(self, path: str, below: str = "") -> Picture:
        """The image of a row; paths must stay inside the benchmark's folder.

        Raises:
            DataError: the path leads outside.
        """
        parts = Path(path)
        if parts.is_absolute() or ".." in parts.parts:
            raise DataError(f"{self.title}: image {path!r} leads outside {self.root / below}")
        return Picture(path, self.root / below / path)

    def llava_rows(self, file: str, images: str) -> list[Row]:
        """Rows of a LLaVA question file whose images lie in one folder.

        Raises:
            DataError: the file is missing, or a line (named) lacks a field.
        """
        path = self.root / file
        rows = []
        for number, record in read_json_lines(path, "question file"):
            question_id, text = record.get("question_id"), record.get("text")
            image = record.get("image")
            if not isinstance(question_id, str | int) or not isinstance(text, str):
                raise DataError(f"{path}:{number}: needs question_id and text")
            if image is not None and not isinstance(image, str):
                raise DataError(f"{path}:{number}: image is {image!r}; it must be a path")
            pictures = () if image is None else (self.image(image, images),)
            rows.append(Row(question_id, text, pictures, str(record.get("category") or "")))
        return rows

    def write(self, folder: Path, name: str, value: Any, indent: int | None = None) -> Path:
        """Writes a JSON file of a submission."""
        return write_text(folder / name, json.dumps(value, indent=indent), "submission")


def check_pictures(benchmark: Benchmark, numbers: Sequence[int]) -> None:
    """Raises DataError where images of rows are missing, before anything slow begins."""
    pictures = {p.name: p for i in numbers for p in benchmark.rows[i].pictures}
    missing = [name for name, picture in pictures.items() if not picture.exists()]
    if missing:
        raise DataError(
            f"{benchmark.title}: {len(missing)} of {len(pictures)} images are not there (first: "
            f"{missing[0]!r} below {benchmark.root}){benchmark.images_hint(missing)}"
        )


def repeated(benchmark: Benchmark) -> list[str]:
    """A note where questions stand twice, as in a file that was appended to itself."""
    if not benchmark.unique_ids:
        return []
    counts = Counter(str(row.question_id) for row in benchmark.all_rows)
    twice = [name for name, count in counts.items() if count > 1]
    return [f"{len(twice)} question ids stand twice (first: {name!r})" for name in twice[:1]]


def unanswered_note(answers: Sequence[str | None]) -> list[str]:
    """A note where answers are missing."""
    missing = sum(answer is None for answer in answers)
    return [f"{missing} of {len(answers)} rows have no answer; they count as wrong"] * (missing > 0)


def all_answered(title: str, rows: Sequence[Row], answers: Sequence[str | None]) -> list[str]:
    """The answers, where none is missing.

    Raises:
        DataError: some are missing; a server would count them as wrong.
    """
    missing = [row.question_id for row, a in zip(rows, answers, strict=True) if a is None]
    if missing:
        raise DataError(
            f"{title}: {len(missing)} of {len(rows)} rows have no answer (first: {missing[0]!r}); "
            "a submission needs all of them"
        )
    return [answer or "" for answer in answers]
