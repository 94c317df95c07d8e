"""MMStar: six axes of 250 questions that cannot be answered without the image."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from dattn_mcore.errors import ConfigError, DataError
from dattn_mcore.evaluation.benchmarks.base import Benchmark, Row, unanswered_note
from dattn_mcore.evaluation.files import read_tsv
from dattn_mcore.evaluation.guessing import compare, count_choices
from dattn_mcore.evaluation.images import Picture
from dattn_mcore.evaluation.outcome import Outcome
from dattn_mcore.evaluation.scores import Score, bars, mean, percent
from dattn_mcore.evaluation.text import LETTER_ANSWER
from dattn_mcore.parallel.packages import import_problem

FILES = ("mmstar.parquet", "MMStar.tsv")
PREFIXES = ("", "(", "option ", "the answer is ")
# Where a letter is read, it begins a word: "all", "the answer is dark blue".
WORD = re.compile(r"(?:\(|option |the answer is )?[a-d][a-z]")


class MmStar(Benchmark):
    """Accuracy by axis and over all; the letter comes first in the answer, or after a prefix.

    An answer that begins with the article "a" counts as A and one that begins with a word counts
    as its first letter ("all" as A, "dog" as D), as in the original, so that scores compare; the
    score says how many did.

    Source: MMStar's eval/vlmeval/evaluate/mmstar.py.
    """

    name = "mmstar"
    title = "MMStar"
    folder = "mmstar"
    full_rows = 1500
    max_new_tokens = 32
    scores = True

    @property
    def file(self) -> str:
        """The parquet file of the release, or VLMEvalKit's TSV."""
        found = (name for name in FILES if (self.root / name).is_file())
        return next(found, FILES[0])

    def required(self) -> list[str]:
        """See the interface."""
        return [self.file]

    @cached_property
    def table(self) -> list[dict[str, Any]]:
        """Cells by row.

        Raises:
            DataError: the file is missing, damaged, or lacks a column.
        """
        path = self.root / self.file
        records = read_tsv(path, "file")[1] if path.suffix == ".tsv" else _read_parquet(path)
        for column in ("index", "question", "answer", "category", "image"):
            if records and column not in records[0]:
                raise DataError(f"{path} lacks the column {column!r}")
        return records

    def load_rows(self) -> list[Row]:
        """See the interface; options stand in the question, or in columns of their own."""
        rows = []
        for number, record in enumerate(self.table):
            source, index = record["image"], _whole_number(record["index"])
            source = source.get("bytes") if isinstance(source, dict) else source
            texts = (record["question"], record["answer"])
            if index is None or not all(isinstance(text, str) and text for text in texts):
                raise DataError(
                    f"{self.root / self.file}: row {number} needs index (a whole number), question "
                    "and answer (texts)"
                )
            if not source or not isinstance(source, str | bytes):
                raise DataError(f"{self.root / self.file}: row {number} needs image")
            lines = [record["question"]]
            lines += [f"{letter}. {record[letter]}" for letter in "ABCD" if record.get(letter)]
            picture = Picture(f"{index}.jpg", source)
            prompt = "\n".join(lines) + LETTER_ANSWER
            rows.append(Row(index, prompt, (picture,), str(record["category"] or "")))
        return rows

    def score(self, answers: Sequence[str | None]) -> Score:
        """See the interface."""
        outcomes = []
        articles = words = gained = 0
        for answer, number in zip(answers, self.chosen, strict=True):
            record = self.table[number]
            text = (answer or "").lower().strip().replace("\n", " ")
            truth = str(record["answer"]).lower().strip()
            right = any(text.startswith(prefix + truth) for prefix in PREFIXES)
            articles += bool(re.match(r"a [a-z]", text))
            if WORD.match(text):
                words += 1
                gained += right
            outcomes.append(Outcome(float(right), text[:20], truth.upper()))
        notes = unanswered_note(answers)
        if articles:
            notes.append(f'{articles} answers begin with the article "a" and are read as A')
        if words:
            notes.append(
                f"{words} answers begin with a word, of which the first letter is read as the "
                f"choice, as in the original; {gained} of them count as right"
            )
        chances = [1 / count_choices(row.prompt) for row in self.rows]
        categories = bars([row.category for row in self.rows], outcomes)
        return Score(
            "accuracy",
            percent(outcomes),
            figures={"average of axes": mean(bar.value for bar in categories.values())},
            categories=categories,
            notes=notes,
            outcomes=outcomes,
            guessing=100 * mean(chances),
            guesses=compare("accuracy", [o.credit for o in outcomes], chances),
        )


def _whole_number(cell: Any) -> int | None:
    if isinstance(cell, str) and re.fullmatch(r"[0-9]{1,18}", cell):
        return int(cell)
    return cell if isinstance(cell, int) and not isinstance(cell, bool) else None


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    if problem := import_problem("pyarrow.parquet"):
        raise ConfigError(
            f"reading {path} needs pyarrow, which {problem} (pip install 'dattn-mcore[eval]'), or "
            "give MMStar.tsv"
        )
    from pyarrow import ArrowException  # optional
    from pyarrow.parquet import read_table

    if not path.is_file():
        raise DataError(f"{path} is not there; put it or {FILES[1]} there")
    try:
        return read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path} is no parquet file ({reason})") from None
