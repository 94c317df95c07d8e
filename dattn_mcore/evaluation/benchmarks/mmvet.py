"""MM-Vet: 218 open questions, a judge gives each answer 0.0 to 1.0."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from dattn_mcore.errors import DataError
from dattn_mcore.evaluation.benchmarks.base import Row, all_answered
from dattn_mcore.evaluation.benchmarks.judged import Judged, check_reviews, failed_note, is_figure
from dattn_mcore.evaluation.files import read_object, take
from dattn_mcore.evaluation.outcome import Outcome
from dattn_mcore.evaluation.scores import Bar, Score, mean

TRUTH = "mm-vet.json"
_MEME = (
    "Can you explain this meme? | This meme is poking fun at the fact that the names of the "
    "countries Iceland and Greenland are misleading. Despite its name, Iceland is known for its "
    "beautiful green landscapes, while Greenland is mostly covered in ice and snow. The meme is "
    "saying that the person has trust issues because the names of these countries do not "
    "accurately represent their landscapes. | "
)
# MM-Vet's own few-shot prompt; scores compare only if the judge reads these very words.
PROMPT = (
    "Compare the ground truth and prediction from AI models, to give a correctness score for the "
    "prediction. <AND> in the ground truth means it is totally right only when all elements in the "
    "ground truth are present in the prediction, and <OR> means it is totally right when any one "
    "element in the ground truth is present in the prediction. The correctness score is 0.0 "
    "(totally wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, or 1.0 (totally right). Just "
    "complete the last space of the correctness score.\n\n"
    "Question | Ground truth | Prediction | Correctness\n--- | --- | --- | ---\n"
    "What is x in the equation? | -1 <AND> -5 | x = 3 | 0.0\n"
    "What is x in the equation? | -1 <AND> -5 | x = -1 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -5 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -5 or 5 | 0.5\n"
    "What is x in the equation? | -1 <AND> -5 | x = -1 or x = -5 | 1.0\n"
    + _MEME
    + "The meme talks about Iceland and Greenland. It's pointing out that despite their names, "
    "Iceland is not very icy and Greenland isn't very green. | 0.4\n"
    + _MEME
    + "The meme is using humor to point out the misleading nature of Iceland's and Greenland's "
    "names. Iceland, despite its name, has lush green landscapes while Greenland is mostly covered "
    "in ice and snow. The text 'This is why I have trust issues' is a playful way to suggest that "
    "these contradictions can lead to distrust or confusion. The humor in this meme is derived "
    "from the unexpected contrast between the names of the countries and their actual physical "
    "characteristics. | 1.0\n"
)


class MmVet(Judged):
    """Mean of the judge's scores, in all and by capability, and the file for MM-Vet's own judge.

    Failed judgements are left out and counted; `--as-original` counts them as 0.

    Source: MM-Vet's evaluator notebook, LLaVA's scripts/convert_mmvet_for_eval.py.
    """

    name = "mm-vet"
    title = "MM-Vet"
    folder = "mm-vet"
    full_rows = 218
    max_new_tokens = 1024
    submits = True
    temperature = 0.0
    max_tokens = 3
    reminder = "\nPredict the correctness of the answer (digit): "

    def required(self) -> list[str]:
        """See the interface."""
        return ["llava-mm-vet.jsonl", "images"]

    def load_rows(self) -> list[Row]:
        """See the interface."""
        return self.llava_rows("llava-mm-vet.jsonl", "images")

    def submit(self, answers: Sequence[str | None], folder: Path, name: str) -> Path:
        """Answers by `v1_<id>`."""
        texts = all_answered(self.title, self.rows, answers)
        value = {f"v1_{r.question_id}": text for r, text in zip(self.rows, texts, strict=True)}
        return self.write(folder, f"{name}.json", value, indent=2)

    def truths(self) -> list[tuple[str, list[str]]]:
        """Ground truth and capabilities for each row.

        Raises:
            DataError: MM-Vet's own file is missing, or lacks a row that is asked.
        """
        path = self.root / TRUTH
        data = read_object(path, "annotation file")
        truths = []
        for row in self.rows:
            name = f"v1_{row.question_id}"
            if name not in data:
                raise DataError(f"{path} has no answer to {name}, which is asked")
            where = f"{path}: {name}"
            capabilities = [str(x) for x in take(data[name], "capability", list, where)]
            truths.append((take(data[name], "answer", str, where), capabilities))
        return truths

    @cached_property
    def _truths(self) -> list[tuple[str, list[str]]]:
        return self.truths()

    def check_truth(self) -> list[str]:
        """See the interface."""
        if not (self.root / TRUTH).is_file():
            return [f"{TRUTH} is not there: answers can be submitted, not judged"]
        self.truths()
        return []

    def conversations(self, answers: Sequence[str | None]) -> list[list[dict[str, str]]]:
        """See the interface."""
        conversations = []
        texts = all_answered(self.title, self.rows, answers)
        for row, text, (truth, _) in zip(self.rows, texts, self._truths, strict=True):
            spaced = truth.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
            content = f"{PROMPT}\n{row.prompt} | {spaced} | {text} | "
            conversations.append([{"role": "user", "content": content}])
        return conversations

    def read_judgement(self, content: str) -> list[float] | None:
        """The first word, if it is a number from 0 to 1."""
        word = (content.split() or [""])[0].rstrip(".")
        if not re.fullmatch(r"[01](\.\d+)?", word) or float(word) > 1:
            return None
        return [float(word)]

    def review(self, number: int, content: str, figures: list[float] | None) -> dict[str, Any]:
        """Id, reply, score (null: failed), capabilities and truth."""
        truth, capabilities = self._truths[number]
        return {
            "question_id": self.rows[number].question_id,
            "content": content,
            "score": figures[0] if figures else None,
            "capability": capabilities,
            "truth": truth,
        }

    def score_reviews(self, reviews: Sequence[dict[str, Any]]) -> Score:
        """See the interface."""
        partial = check_reviews(self, reviews)
        outcomes, groups, failed = [], dict[str, list[float]](), 0
        for number, review in enumerate(reviews, start=1):
            value = review.get("score")
            if "score" not in review or not (value is None or is_figure(value)):
                raise DataError(f"review {number} of {self.title} has no score")
            where = f"review {number} of {self.title}"
            failed += value is None
            text = "failed" if value is None else f"{value:g}"
            if value is None and self.options.as_original:
                value = 0.0
            outcomes.append(Outcome(value, text, str(review.get("truth", ""))))
            if value is not None:
                for capability in take({"capability": [], **review}, "capability", list, where):
                    groups.setdefault(str(capability), []).append(float(value))
        values = [o.credit for o in outcomes if o.credit is not None]
        if not values:
            raise DataError(f"{self.title}: none of {len(reviews)} judgements succeeded")
        return Score(
            "judge's mean score",
            100 * mean(values),
            figures={"judged": len(reviews) - failed, "failed judgements": failed},
            categories={name: Bar(100 * mean(v), len(v)) for name, v in sorted(groups.items())},
            notes=failed_note(failed, len(reviews), self.options.as_original) + partial,
            outcomes=outcomes,
        )
