"""MMBench: multiple choice, each question asked with its options in every rotation."""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections.abc import Hashable, Sequence
from functools import cached_property
from pathlib import Path

from dattn_mcore.errors import ConfigError, DataError
from dattn_mcore.evaluation.benchmarks.base import (
    Benchmark,
    Row,
    all_answered,
    unanswered_note,
)
from dattn_mcore.evaluation.files import read_tsv
from dattn_mcore.evaluation.guessing import compare
from dattn_mcore.evaluation.images import Picture
from dattn_mcore.evaluation.outcome import Outcome
from dattn_mcore.evaluation.scores import Score, bars, mean, percent
from dattn_mcore.evaluation.text import LETTER_ANSWER, leading_letter
from dattn_mcore.parallel.packages import import_problem

FILE = "mmbench_dev_20230712.tsv"
CHOICES = "ABCD"
ROTATION = 1_000_000
DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")
PREDICTION_COLUMN = 6
CHINESE_LETTER_ANSWER = "\n请直接回答选项字母。"
_CHINESE = re.compile("[\u4e00-\u9fff]")
_NAMED = re.compile(r"(?:answer is|答案(?:是|为|:)|选项?) ?\(?([A-D])(?![A-Za-z0-9])")


class MmBench(Benchmark):
    """Submission (xlsx), and the circular score where the file has the answers.

    Circular: a question is right only if it is right in all its rows, which stand under
    index + k x 10^6. These are the rows that the file has: the released one lacks a rotation of 53
    questions, which count by their others. MMBench-CN is asked in Chinese. The server reads
    free-form answers with a language model; here only letters and options count.

    Source: LLaVA's model_vqa_mmbench.py and convert_mmbench_for_submission.py, MMBench's paper.
    """

    name = "mmbench"
    title = "MMBench"
    folder = "mmbench"
    full_rows = 4377
    max_new_tokens = 1024
    scores = True
    submits = True

    @property
    def file(self) -> str:
        """The released file, or the only TSV of the folder."""
        others = sorted(path.name for path in self.root.glob("*.tsv"))
        return others[0] if FILE not in others and len(others) == 1 else FILE

    @property
    def released_rows(self) -> int:
        """See the interface; known of one file."""
        return self.full_rows if self.file == FILE else 0

    @cached_property
    def chinese(self) -> bool:
        """Whether the questions are in Chinese: most of them, as words may be quoted in others."""
        questions = [cell["question"] or "" for cell in self.table[1]]
        return 2 * sum(bool(_CHINESE.search(text)) for text in questions) > len(questions)

    def asked_with(self) -> dict[str, str]:
        """See the interface: the suffix, which is not saved with the prompt."""
        return {"language": "Chinese"} if self.chinese else {}

    def required(self) -> list[str]:
        """See the interface."""
        return [self.file]

    @cached_property
    def table(self) -> tuple[list[str], list[dict[str, str | None]]]:
        """Columns and cells of the TSV.

        Raises:
            DataError: it is missing, lacks a column, or has an index twice.
        """
        path = self.root / self.file
        header, cells = read_tsv(path, "question file")
        lacking = [c for c in ("index", "question", "image", "A") if c not in header]
        if lacking:
            raise DataError(f"{path} lacks the column {lacking[0]!r}; it has {', '.join(header)}")
        seen: dict[int, int] = {}
        for number, cell in enumerate(cells, start=2):
            if not re.fullmatch("[0-9]{1,18}", cell["index"] or "") or not (
                cell["question"] and cell["image"]
            ):
                raise DataError(f"{path}: row {number} needs index, question and image")
            first = seen.setdefault(int(cell["index"] or 0), number)
            if first != number:  # it would count as another rotation
                raise DataError(
                    f"{path}: row {number} has index {cell['index']}, as row {first} has; every "
                    "rotation has one of its own (index + k x 10^6)"
                )
        return header, cells

    def load_rows(self) -> list[Row]:
        """See the interface."""
        rows = []
        for cell in self.table[1]:
            choices = options(cell)
            lines = [cell["question"] or ""]
            lines = [cell["hint"], *lines] if cell.get("hint") else lines  # type: ignore[list-item]
            letters = CHOICES[: len(choices)]
            lines += [f"{letter}. {o}" for letter, o in zip(letters, choices, strict=True)]
            index = int(cell["index"] or 0)
            rows.append(
                Row(
                    index,
                    "\n".join(lines),
                    (Picture(f"{index}.jpg", cell["image"] or ""),),
                    cell.get("category") or "",
                    suffix=CHINESE_LETTER_ANSWER if self.chinese else LETTER_ANSWER,
                    extra={"round_id": 0, "options": choices, "option_char": list(letters)},
                )
            )
        return rows

    def together(self, row: Row) -> Hashable:
        """All rotations of a question."""
        return int(row.question_id) % ROTATION

    def groups(self) -> list[list[int]]:
        """Row numbers of each question, the row of its lowest index first."""
        groups: dict[int, list[int]] = {}
        for number in sorted(range(len(self.rows)), key=lambda i: int(self.rows[i].question_id)):
            groups.setdefault(int(self.rows[number].question_id) % ROTATION, []).append(number)
        return list(groups.values())

    def unscored(self) -> str:
        """The file of the test split has no answers.

        Raises:
            DataError: some rows have an answer, and others have none.
        """
        cells = self.table[1]
        without = [cell["index"] for cell in cells if cell.get("answer") is None]
        if len(without) == len(cells):
            return f"{self.file} has no answers; submit it to the server"
        if without:
            raise DataError(
                f"{self.root / self.file}: {len(without)} of {len(cells)} rows have no answer "
                f"(first: index {without[0]}); the file is damaged, take it anew"
            )
        return ""

    def check_truth(self) -> list[str]:
        """See the interface."""
        asked = f"file {self.file}, asked in {'Chinese' if self.chinese else 'English'}"
        if self.unscored():
            return [asked, self.unscored()]
        notes, groups = [asked], self.groups()
        fewer = sum(len(group) < len(self.rows[group[0]].extra["options"]) for group in groups)
        if fewer and any(len(group) > 1 for group in groups):
            notes.append(
                f"{fewer} of {len(groups)} questions have fewer rows than options; the rows that "
                "the file has count"
            )
        return notes

    def score(self, answers: Sequence[str | None]) -> Score:
        """See the interface.

        Raises:
            ConfigError: the file has no answers.
        """
        if self.unscored():
            raise ConfigError(f"{self.root}: {self.unscored()}")
        cells = [self.table[1][number] for number in self.chosen]
        notes = [*self.check_truth(), *unanswered_note(answers)]
        outcomes = []
        for answer, row, cell in zip(answers, self.rows, cells, strict=True):
            letter = choice(answer or "", row.extra["options"])
            truth = cell["answer"] or ""
            outcomes.append(Outcome(float(letter == truth), letter, truth))
        unread = sum(not o.parsed for o in outcomes)
        if unread:
            notes.append(f"{unread} answers name no option; the server may read them otherwise")
        groups = self.groups()
        circular = [Outcome(min(outcomes[i].credit or 0.0 for i in g), "", "") for g in groups]
        first = [outcomes[group[0]] for group in groups]
        once = [self._chance(self.rows[group[0]]) for group in groups]
        one_pass = compare("accuracy in one pass", [o.credit for o in first], once)
        figures = {"accuracy in one pass": percent(first), "base questions": len(groups)}
        categories = bars([self.rows[group[0]].category for group in groups], circular)
        if all(len(group) == 1 for group in groups):
            notes.append("no question has more than one rotation: the accuracy in one pass")
            return Score(
                "accuracy",
                percent(first),
                figures=figures,
                categories=categories,
                notes=notes,
                outcomes=outcomes,
                guessing=100 * mean(once),
                guesses=one_pass,
            )
        # A guess is drawn anew in each rotation.
        rotated = [math.prod(self._chance(self.rows[i]) for i in group) for group in groups]
        return Score(
            "circular accuracy",
            percent(circular),
            figures=figures,
            categories=categories,
            notes=notes,
            outcomes=outcomes,
            guessing=100 * mean(rotated),
            guesses=[
                *compare("circular accuracy", [o.credit for o in circular], rotated),
                *one_pass,
            ],
        )

    def _chance(self, row: Row) -> float:
        return 1 / max(len(row.extra["options"]), 1)

    def submit(self, answers: Sequence[str | None], folder: Path, name: str) -> Path:
        """The table without images and hints, with a column of predictions.

        Raises:
            ConfigError: openpyxl is not installed.
            DataError: an answer is missing, or the file cannot be written.
        """
        texts = all_answered(self.title, self.rows, answers)
        if problem := import_problem("openpyxl"):
            raise ConfigError(
                f"writing xlsx needs openpyxl, which {problem}; pip install 'dattn-mcore[eval]'"
            )
        from openpyxl import Workbook  # optional
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

        header, cells = self.table
        kept = [column for column in header if column not in DROPPED]
        columns = [*kept[:PREDICTION_COLUMN], "prediction", *kept[PREDICTION_COLUMN:]]
        book = Workbook(write_only=False)
        sheet = book.active
        sheet.append([ILLEGAL_CHARACTERS_RE.sub("", column) for column in columns])
        for line, (cell, text) in enumerate(zip(cells, texts, strict=True), start=2):
            values = {**cell, "prediction": text}
            for number, column in enumerate(columns, start=1):
                value = values[column]
                place = sheet.cell(line, number)
                if column == "index":
                    place.value = int(value or 0)
                elif value:
                    place.value = ILLEGAL_CHARACTERS_RE.sub("", value)
                    place.data_type = "s"  # an answer that begins with "=" is no formula
        path = folder / f"{name}.xlsx"
        temporary = folder / f".{path.name}.{os.getpid()}.tmp"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            book.save(temporary)
            temporary.replace(path)  # it appears under its name when whole
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise DataError(f"submission {path} cannot be written ({error.strerror})") from None
        return path


def options(cell: dict[str, str | None]) -> list[str]:
    """Options up to the first that is missing."""
    found = []
    for letter in CHOICES:
        value = cell.get(letter)
        if value is None:
            break
        found.append(value)
    return found


def choice(text: str, choices: Sequence[str]) -> str:
    """The letter that an answer names, by letter or by the option's text; empty: none."""
    letters = CHOICES[: len(choices)]
    text = unicodedata.normalize("NFKC", text)  # full-width letters and brackets of Chinese text
    letter = leading_letter(text, letters)
    if letter is None:
        found = _NAMED.findall(text)
        letter = found[0] if len(found) == 1 and found[0] in letters else None
    if letter is None:
        equal = [i for i, option in enumerate(choices) if _plain(option) == _plain(text)]
        letter = letters[equal[0]] if len(equal) == 1 else None
    return letter or ""


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text).strip().rstrip(".。").lower()
