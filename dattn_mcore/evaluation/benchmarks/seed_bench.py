"""SEED-Bench: twelve types of question about images and middle frames of videos."""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from dattn_mcore.errors import DataError
from dattn_mcore.evaluation.benchmarks.base import (
    Benchmark,
    Row,
    all_answered,
    unanswered_note,
)
from dattn_mcore.evaluation.files import read_json, take, write_text
from dattn_mcore.evaluation.guessing import compare, count_choices
from dattn_mcore.evaluation.outcome import Outcome
from dattn_mcore.evaluation.scores import Score, bars, mean, percent
from dattn_mcore.evaluation.text import leading_letter, lenient_hint

LETTERS = "ABCD"
CHOICES = tuple(LETTERS)
KINDS = ("image", "video")
FRAMES = "SEED-Bench-video-image"


class SeedBench(Benchmark):
    """Accuracy by exact letter: per type, images, videos, all.

    Ids are numbers in one file and text in the other; both are read as text. With
    `--lenient-letters` an answer like `A.` counts as A, which the original does not do.

    Source: LLaVA's scripts/convert_seed_for_submission.py.
    """

    name = "seed"
    title = "SEED-Bench"
    folder = "seed_bench"
    full_rows = 19242
    scores = True
    submits = True

    def required(self) -> list[str]:
        """See the interface."""
        frames = [] if self.options.seed_images_only else [FRAMES]
        return ["llava-seed-bench.jsonl", "SEED-Bench.json", "SEED-Bench-image", *frames]

    def load_rows(self) -> list[Row]:
        """See the interface."""
        return [
            row for row in self._all_rows if not (self.options.seed_images_only and _video(row))
        ]

    @cached_property
    def _all_rows(self) -> list[Row]:
        return self.llava_rows("llava-seed-bench.jsonl", "")

    def file_rows(self) -> int:
        """See the interface."""
        return len(self._all_rows)

    def left_out(self) -> set[Hashable]:
        """The video rows, where they are not asked: answers to all rows can be scored so."""
        rows = self._all_rows if self.options.seed_images_only else []
        return {self.join_key(row.question_id, row.prompt) for row in rows if _video(row)}

    def images_hint(self, missing: Sequence[str]) -> str:
        """Frames have to be extracted; who has none can do without."""
        if not any(name.startswith(FRAMES) for name in missing):
            return ""
        return "; extract the videos' middle frames, or give --seed-images-only"

    def truths(self) -> list[tuple[str, str, str]]:
        """Answer, name of the question's type, image or video, for each row.

        Raises:
            DataError: the annotation file is missing, or lacks a question that is asked.
        """
        path = self.root / "SEED-Bench.json"
        data = read_json(path, "annotation file")
        try:
            names = {kind: name for name, kind in data["question_type"].items()}
            entries: dict[str, Any] = {str(q["question_id"]): q for q in data["questions"]}
        except (TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{path} is no SEED-Bench annotation file ({error!r})") from None
        truths = []
        for row in self.rows:
            entry = entries.get(str(row.question_id))
            if entry is None:
                raise DataError(f"{path} has no question {row.question_id!r}, which is asked")
            where = f"{path}: question {row.question_id!r}"
            kind = take(entry, "question_type_id", int, where)
            data_type = take(entry, "data_type", str, where)
            if data_type not in KINDS:  # it would be in neither of the two figures
                raise DataError(f"{where}: data_type is {data_type!r}; it must be image or video")
            truths.append(
                (take(entry, "answer", str, where), names.get(kind, str(kind)), data_type)
            )
        return truths

    def check_truth(self) -> list[str]:
        """See the interface."""
        return self._unasked(self.truths())

    def _unasked(self, truths: Sequence[tuple[str, str, str]]) -> list[str]:
        absent = [kind for kind in KINDS if kind not in {t[2] for t in truths}]
        return [f"no rows about {kind}s are asked; the score is over the others" for kind in absent]

    def score(self, answers: Sequence[str | None]) -> Score:
        """See the interface."""
        truths = self.truths()
        outcomes = []
        for answer, (truth, _, _) in zip(answers, truths, strict=True):
            parsed = answer or ""
            if self.options.lenient_letters:
                parsed = leading_letter(parsed, LETTERS) or parsed
            outcomes.append(Outcome(float(parsed == truth), parsed, truth))
        chances = [1 / count_choices(row.prompt) for row in self.rows]
        guesses = compare("accuracy", [o.credit for o in outcomes], chances)
        figures = {}
        for kind in KINDS:
            group = [o for o, t in zip(outcomes, truths, strict=True) if t[2] == kind]
            if group:
                figures[kind] = percent(group)
        unread = [o.parsed for o in outcomes if o.parsed not in CHOICES]
        notes = self._unasked(truths) + unanswered_note(answers)
        if unread:
            notes.append(
                f"{len(unread)} answers are no single letter and count as wrong"
                f"{lenient_hint(unread, LETTERS)}"
            )
        if self.options.lenient_letters:
            notes.append("letters read leniently; the original wants the letter alone")
        return Score(
            "accuracy",
            percent(outcomes),
            figures=figures,
            categories=bars([t[1] for t in truths], outcomes),
            notes=notes,
            outcomes=outcomes,
            guessing=100 * mean(chances),
            guesses=guesses,
        )

    def submit(self, answers: Sequence[str | None], folder: Path, name: str) -> Path:
        """JSON lines for the leaderboard."""
        texts = all_answered(self.title, self.rows, answers)
        lines = (
            json.dumps({"question_id": str(row.question_id), "prediction": text}) + "\n"
            for row, text in zip(self.rows, texts, strict=True)
        )
        return write_text(folder / f"{name}.jsonl", "".join(lines), "submission")


def _video(row: Row) -> bool:
    return any(picture.name.startswith(FRAMES) for picture in row.pictures)
