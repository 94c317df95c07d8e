"""ScienceQA, test split, questions with and without an image."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from dattn_mcore.errors import DataError
from dattn_mcore.evaluation.benchmarks.base import Benchmark, Row, unanswered_note
from dattn_mcore.evaluation.files import read_json, take
from dattn_mcore.evaluation.guessing import compare
from dattn_mcore.evaluation.outcome import Outcome
from dattn_mcore.evaluation.scores import Bar, Score, mean, percent
from dattn_mcore.evaluation.text import LETTER_ANSWER, LETTERS, leading_letter, lenient_hint
from dattn_mcore.types import IMAGE_MARK


class ScienceQa(Benchmark):
    """Accuracy over all problems of the split, and over those with an image (IMG).

    Source: LLaVA's llava/eval/{model_vqa_science,eval_science_qa}.py. IMG is decided by `<image>`
    in the prompt, and a problem without an answer is wrong.
    """

    name = "scienceqa"
    title = "ScienceQA"
    folder = "scienceqa"
    full_rows = 4241
    max_new_tokens = 1024
    scores = True
    question_file = "llava_test_CQM-A.json"

    def required(self) -> list[str]:
        """See the interface."""
        return [self.question_file, "images/test", "pid_splits.json", "problems.json"]

    def load_rows(self) -> list[Row]:
        """Text is the human turn without its mark; the mark goes in front where it has an image."""
        path = self.root / self.question_file
        records = read_json(path, "question file")
        if not isinstance(records, list):
            raise DataError(f"{path} must be a JSON list")
        rows = []
        for number, record in enumerate(records):
            try:
                text = record["conversations"][0]["value"].replace(IMAGE_MARK, "").strip()
                question_id, image = str(record["id"]), record.get("image")
                if image is not None:
                    take(record, "image", str, f"{path}: entry {number}")
            except (TypeError, KeyError, IndexError, AttributeError):
                raise DataError(f"{path}: entry {number} needs id and conversations") from None
            mark = "" if image is None else f"{IMAGE_MARK}\n"
            pictures = () if image is None else (self.image(image, "images/test"),)
            category = "text" if image is None else "image"
            rows.append(Row(question_id, mark + text + LETTER_ANSWER, pictures, category))
        return rows

    def problems(self) -> dict[str, dict[str, Any]]:
        """Choices and answer of every problem of the test split, by id."""
        path = self.root / "problems.json"
        problems = read_json(path, "problems")
        splits = read_json(self.root / "pid_splits.json", "split file")
        try:
            chosen = {str(pid): problems[str(pid)] for pid in splits["test"]}
        except (KeyError, TypeError) as error:
            raise DataError(f"{path} does not fit pid_splits.json ({error!r} is missing)") from None
        for pid, problem in chosen.items():
            where = f"{path}: problem {pid}"
            choices = take(problem, "choices", list, where)[: len(LETTERS)]
            if take(problem, "answer", int, where) not in range(len(choices)):
                raise DataError(f"{where} has an answer beyond its choices")
        return chosen

    def check_truth(self) -> list[str]:
        """See the interface."""
        problems = self.problems()
        strangers = [row.question_id for row in self.rows if row.question_id not in problems]
        if strangers:
            raise DataError(
                f"{self.root / 'problems.json'} has no test problem {strangers[0]!r}, which is "
                "asked; the question file belongs to another split"
            )
        missing = len(self._unasked(problems))
        return [
            f"{missing} problems of the split are not asked; they count as wrong in the accuracy, "
            "and are in no other figure"
        ] * (missing > 0)

    def _unasked(self, problems: dict[str, dict[str, Any]]) -> set[str]:
        """Problems that the question file lacks; of a part of it, the score is over that part."""
        if len(self.rows) < len(self.all_rows):
            return set()
        return set(problems) - {str(row.question_id) for row in self.rows}

    def score(self, answers: Sequence[str | None]) -> Score:
        """See the interface."""
        notes = self.check_truth() + unanswered_note(answers)
        problems = self.problems()
        outcomes = []
        for row, answer in zip(self.rows, answers, strict=True):
            problem = problems[str(row.question_id)]
            letter = self.letter(answer or "")
            right = letter in LETTERS[: len(problem["choices"])] and (
                LETTERS.index(letter) == problem["answer"]
            )
            outcomes.append(Outcome(float(right), letter, LETTERS[problem["answer"]]))
        unasked = len(self._unasked(problems))
        outcomes_all = [*outcomes, *([Outcome(0.0, "FAILED", "")] * unasked)]
        marked = [o for o, r in zip(outcomes, self.rows, strict=True) if IMAGE_MARK in r.prompt]
        plain = [o for o, r in zip(outcomes, self.rows, strict=True) if IMAGE_MARK not in r.prompt]
        chances = [
            1 / len(problems[str(row.question_id)]["choices"][: len(LETTERS)]) for row in self.rows
        ]
        with_image = [c for c, r in zip(chances, self.rows, strict=True) if IMAGE_MARK in r.prompt]
        chances += [0.0] * unasked
        failed = [
            answer or ""
            for answer, outcome in zip(answers, outcomes, strict=True)
            if outcome.parsed == "FAILED"
        ]
        if failed:
            notes.append(
                f"{len(failed)} answers name no choice in a form that counts{lenient_hint(failed)}"
            )
        return Score(
            "accuracy",
            percent(outcomes_all),
            figures={
                "IMG accuracy": percent(marked),
                "right": sum(o.credit or 0 for o in outcomes),
                "of": len(outcomes_all),
            },
            categories={
                name: Bar(percent(group), len(group))
                for name, group in (("with image (IMG)", marked), ("text only", plain))
                if group
            },
            notes=notes,
            outcomes=outcomes,
            guessing=100 * mean(chances),
            guesses=[
                *compare("accuracy", [o.credit for o in outcomes], chances),
                *compare("IMG accuracy", [o.credit for o in marked], with_image),
            ],
        )

    def letter(self, text: str) -> str:
        """The choice that an answer names: `B`, `B. ...`, or one `The answer is B.`."""
        if len(text) == 1 and text in LETTERS:
            return text
        if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
            return text[0]
        found = re.findall(r"The answer is ([A-Z]).", text)
        if len(found) == 1:
            return found[0]
        lenient = leading_letter(text) if self.options.lenient_letters else None
        return lenient or "FAILED"
