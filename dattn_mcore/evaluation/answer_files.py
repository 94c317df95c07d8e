"""Answer files: read, joined to rows, and written while a run goes on.

A run appends each batch to a part file of its process; a kill can cut the last line, which is then
answered again. When all rows of a benchmark are answered, the parts become one file in the order
of the questions.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections import deque
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from dattn_mcore.errors import DataError
from dattn_mcore.evaluation.benchmarks.base import Benchmark
from dattn_mcore.evaluation.files import parse_json, read_json_lines, take, write_json_lines
from dattn_mcore.evaluation.prompts import same_question, words_asked


def read_answers_for(benchmark: Benchmark, path: Path) -> list[str | None]:
    """Answers of a LLaVA answer file for each row of a benchmark, joined by id (and question).

    Ids of different benchmarks overlap, so the prompts are compared too, where answers have them.

    Raises:
        DataError: the file is empty or malformed, answers other questions, or answers one twice.
    """
    waiting: dict[Hashable, deque[int]] = {}
    for number, row in enumerate(benchmark.rows):
        key = benchmark.join_key(row.question_id, row.prompt)
        waiting.setdefault(key, deque()).append(number)
    answers: list[str | None] = [None] * len(benchmark.rows)
    prompts: dict[int, str] = {}
    left_out = benchmark.left_out()
    strangers: list[Any] = []
    total = 0
    for line, record in read_json_lines(path, "--answers"):
        question_id, text = record.get("question_id"), record.get("text")
        if not isinstance(question_id, str | int) or not isinstance(text, str):
            raise DataError(f"{path}:{line}: needs question_id and text")
        total += 1
        prompt = record.get("prompt")
        prompt = prompt if isinstance(prompt, str) else ""
        key = benchmark.join_key(question_id, prompt)
        if key in left_out:
            continue
        rows = waiting.get(key)
        if rows is None:
            strangers.append(question_id)
        elif not rows:
            raise DataError(f"{path}:{line}: question {question_id!r} is answered twice")
        else:
            number = rows.popleft()
            answers[number] = text
            if prompt:
                prompts[number] = prompt
    if not total:
        raise DataError(f"--answers {path} holds no answers; give a file in LLaVA's form")
    if strangers:
        raise DataError(
            f"--answers {path}: {len(strangers)} of {total} answers are to questions that "
            f"{benchmark.title} does not ask (first: {strangers[0]!r}); they belong to another "
            "benchmark or split"
        )
    _check_prompts(benchmark, path, prompts)
    benchmark.answered_prompts = prompts
    return answers


def _check_prompts(benchmark: Benchmark, path: Path, prompts: dict[int, str]) -> None:
    """Refuses answers most of whose prompts ask something else than the rows of their ids."""
    rows = benchmark.rows
    other = [i for i, prompt in prompts.items() if not same_question(prompt, rows[i].prompt)]
    if 2 * len(other) > len(prompts):
        row, prompt = rows[other[0]], prompts[other[0]]
        asked, answered = words_asked(row.prompt), words_asked(prompt)
        raise DataError(
            f"--answers {path}: {len(other)} of {len(prompts)} prompts ask something else than "
            f"{benchmark.title} does (question {row.question_id!r} is {asked!r:.90}, the answer's "
            f"prompt {answered!r:.90}); they belong to another benchmark or split"
        )


class AnswerStore:
    """The answers of one benchmark in a run's folder.

    Args:
        folder: the run's `answers` folder.
        benchmark: whose rows are answered.
        model_id: name of the model, for the answer lines.
        metadata: how answers are generated; answers generated otherwise are refused.
    """

    def __init__(
        self, folder: Path, benchmark: Benchmark, model_id: str, metadata: dict[str, Any]
    ) -> None:
        self.benchmark, self.model_id, self.metadata = benchmark, model_id, metadata
        self.whole = folder / f"{benchmark.name}.jsonl"
        self.parts = folder / "parts" / benchmark.name

    def read(self) -> dict[int, dict[str, Any]]:
        """Answer lines by row number; the cut last line of a part is passed over.

        Raises:
            DataError: they are to other questions, or were generated otherwise.
        """
        found: dict[int, dict[str, Any]] = {}
        for path in (self.whole, *sorted(self.parts.glob("*.jsonl"))):
            if path.is_file():
                for line in path.read_bytes().split(b"\n")[:-1]:
                    record = self._checked(line, path)
                    found[record["metadata"]["row"]] = record
        return found

    def _checked(self, line: bytes, path: Path) -> dict[str, Any]:
        way_out = "give another --out, or remove that file to answer again"
        rows = self.benchmark.rows
        try:
            record = parse_json(line.decode())
            number = record["metadata"]["row"]
            row = rows[number] if 0 <= number < len(rows) else None
            asked = record["question_id"], record["prompt"]
            take(record, "text", str, "the line")
        except (ValueError, KeyError, TypeError, DataError):
            raise DataError(f"{path} holds a damaged line; {way_out}") from None
        if row is None or asked != (row.question_id, row.prompt):
            raise DataError(f"{path} holds answers to other questions; {way_out}")
        made = {k: v for k, v in record["metadata"].items() if k != "row"}
        if made != self.metadata:
            raise DataError(
                f"{path} was generated with {made}, this run has {self.metadata}; {way_out}"
            )
        return record

    def open_answers(self, rank: int) -> AnswersFile:
        """The part file of a process, without a cut last line."""
        return AnswersFile(self, self.parts / f"{rank}.jsonl")

    def line(self, number: int, text: str) -> dict[str, Any]:
        """An answer in LLaVA's form."""
        row = self.benchmark.rows[number]
        name = f"{self.model_id}/{self.benchmark.name}/{number}/{row.prompt}/{text}"
        return {
            "question_id": row.question_id,
            "prompt": row.prompt,
            "text": text,
            **row.extra,
            "answer_id": str(uuid.uuid5(uuid.NAMESPACE_OID, name)),
            "model_id": self.model_id,
            "metadata": {"row": number, **self.metadata},
        }

    def merge(self) -> list[str]:
        """Makes one file of the parts; returns the answers by row.

        Raises:
            DataError: rows are missing.
        """
        found = self.read()
        missing = len(self.benchmark.rows) - len(found)
        if missing:
            raise DataError(f"{self.benchmark.title}: {missing} rows are not answered yet")
        records = [found[number] for number in range(len(found))]
        write_json_lines(self.whole, records, "answers")
        for path in self.parts.glob("*.jsonl"):
            with contextlib.suppress(OSError):  # it only says again what the whole file says
                path.unlink()
        return [record["text"] for record in records]


class AnswersFile:
    """An answer file that grows batch by batch, on disk after each."""

    def __init__(self, store: AnswerStore, path: Path) -> None:
        self.store, self.path = store, path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("ab")
            end = path.read_bytes().rfind(b"\n") + 1
            self.file.truncate(end)
        except OSError as error:
            raise DataError(f"answers {path} cannot be written ({error.strerror})") from None

    def append(self, answers: dict[int, str]) -> None:
        """Writes the answers of a batch, by row number.

        Raises:
            DataError: they cannot be written, as where the disk is full.
        """
        lines = (json.dumps(self.store.line(n, t), ensure_ascii=False) for n, t in answers.items())
        try:
            self.file.write("".join(f"{line}\n" for line in lines).encode())
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as error:
            raise DataError(
                f"answers {self.path} cannot be written ({error.strerror}); run again when they "
                "can be, what is answered is kept"
            ) from None

    def __enter__(self) -> AnswersFile:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # what a full disk left over; `append` has reported it
            self.file.close()
