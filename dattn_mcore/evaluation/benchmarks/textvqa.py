"""TextVQA, validation split 0.5.1."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

from dattn_mcore.errors import DataError
from dattn_mcore.evaluation.benchmarks.base import Benchmark, Row, unanswered_note
from dattn_mcore.evaluation.files import read_json
from dattn_mcore.evaluation.outcome import Outcome
from dattn_mcore.evaluation.prompts import OCR_MARK
from dattn_mcore.evaluation.scores import Score, mean, percent
from dattn_mcore.evaluation.text import normalise_answer

ANNOTATIONS = "TextVQA_0.5.1_val.json"


class TextVqa(Benchmark):
    """Mean soft accuracy over ten human answers.

    A question's id is its image's id, which is not unique: answers and annotations are joined by
    image and lower-case question. Prompts carry reference OCR tokens, which is worth more than ten
    points: the score says whether those that were answered did.

    Source: LLaVA's llava/eval/{eval_textvqa,m4c_evaluator}.py.
    """

    name = "textvqa"
    title = "TextVQA"
    folder = "textvqa"
    full_rows = 5000
    unique_ids = False  # an id is its image's
    scores = True

    def required(self) -> list[str]:
        """See the interface."""
        return ["llava_textvqa_val_v051_ocr.jsonl", "train_images", ANNOTATIONS]

    def load_rows(self) -> list[Row]:
        """See the interface; without OCR, its line is taken out of the prompt."""
        rows = self.llava_rows("llava_textvqa_val_v051_ocr.jsonl", "train_images")
        if self.options.textvqa_ocr:
            return rows
        return [replace(row, prompt=_without_ocr(row.prompt)) for row in rows]

    def join_key(self, question_id: str | int, prompt: str) -> Hashable:
        """Image and question."""
        return str(question_id), question_of(prompt)

    def truths(self) -> list[list[str]]:
        """The human answers for each row.

        Raises:
            DataError: the annotation file is missing, or lacks a question that is asked.
        """
        path = self.root / ANNOTATIONS
        data = read_json(path, "annotation file")
        try:
            found = {
                (str(e["image_id"]), e["question"].lower()): e["answers"] for e in data["data"]
            }
        except (TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{path} is no TextVQA annotation file ({error!r})") from None
        truths = []
        for row in self.rows:
            answers = found.get((str(row.question_id), question_of(row.prompt)))
            if answers is None:
                raise DataError(
                    f"{path} has no question {question_of(row.prompt)!r} about image "
                    f"{row.question_id!r}, which is asked"
                )
            if not isinstance(answers, list) or len(answers) != 10:
                count = len(answers) if isinstance(answers, list) else "no list of"
                raise DataError(f"{path}: image {row.question_id!r} has {count} answers, not 10")
            if not all(isinstance(answer, str) for answer in answers):
                raise DataError(f"{path}: image {row.question_id!r} has an answer that is no text")
            truths.append(answers)
        return truths

    def score(self, answers: Sequence[str | None]) -> Score:
        """See the interface."""
        outcomes = []
        for answer, humans in zip(answers, self.truths(), strict=True):
            parsed = normalise_answer(answer or "")
            normal = [normalise_answer(human) for human in humans]
            credit = 0.0 if answer is None else soft_accuracy(parsed, normal)
            common = max(dict.fromkeys(normal), key=normal.count)
            outcomes.append(Outcome(credit, parsed, common))
        with_ocr, note = self._ocr()
        return Score(
            "accuracy",
            percent(outcomes),
            figures={"rows with OCR tokens": with_ocr},
            notes=[note, *unanswered_note(answers)],
            outcomes=outcomes,
        )

    def _ocr(self) -> tuple[int, str]:
        """How many of the prompts that were answered hold OCR tokens, and what to say about it.

        The answers' own prompts tell; where a file has none, the rows' prompts have to.
        """
        prompts = list(self.answered_prompts.values()) or [row.prompt for row in self.rows]
        count, total = sum(OCR_MARK in prompt for prompt in prompts), len(prompts)
        if 0 < count < total:
            return count, (
                f"mixed: {count} of {total} prompts have reference OCR tokens, the others have none"
            )
        return count, f"{'with' if count else 'without'} reference OCR tokens in the prompt"


def soft_accuracy(answer: str, humans: list[str]) -> float:
    """Mean over leaving one human out of min(1, equal answers among the others / 3)."""
    if answer not in humans:
        return 0.0
    equal = humans.count(answer)
    return mean(min(1.0, (equal - (human == answer)) / 3) for human in humans)


def question_of(prompt: str) -> str:
    """The lower-case question in a prompt, which OCR tokens may precede or follow."""
    lines = prompt.split("\n")
    return lines[1 if lines[0].startswith(OCR_MARK) and len(lines) > 1 else 0].lower()


def _without_ocr(prompt: str) -> str:
    return "\n".join(line for line in prompt.split("\n") if not line.startswith(OCR_MARK))
