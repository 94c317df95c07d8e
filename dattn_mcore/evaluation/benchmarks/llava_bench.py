"""LLaVA-Bench in the wild: 60 questions, a judge compares with GPT-4's text-only answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dattn_mcore.errors import DataError
from dattn_mcore.evaluation.benchmarks.base import Row, all_answered
from dattn_mcore.evaluation.benchmarks.judged import Judged, check_reviews, failed_note, is_figure
from dattn_mcore.evaluation.files import read_json, read_json_lines
from dattn_mcore.evaluation.outcome import Outcome
from dattn_mcore.evaluation.scores import Bar, Score, mean

SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
# The rule of all three categories in LLaVA's llava/eval/table/rule.json; scores compare only if
# the judge reads these very words.
RULE = (
    "We would like to request your feedback on the performance of two AI assistants in response to "
    "the user question displayed above. The user asks the question on observing an image. For your "
    "reference, the visual content in the image is represented with a few sentences describing the "
    "image. \nPlease rate the helpfulness, relevance, accuracy, level of details of their "
    "responses. Each assistant receives an overall score on a scale of 1 to 10, where a higher "
    "score indicates better overall performance.\nPlease first output a single line containing "
    "only two values indicating the scores for Assistant 1 and 2, respectively. The two scores are "
    "separated by a space.\nIn the subsequent line, please provide a comprehensive explanation of "
    "your evaluation, avoiding any potential bias and ensuring that the order in which the "
    "responses were presented does not affect your judgment."
)
LOWEST = 0.1  # credit of the judge's lowest score, 1 of 10
FAILED = [-1.0, -1.0]  # how review files mark a failed judgement


class LlavaBench(Judged):
    """100 x mean score of the answers / mean score of the reference answers.

    The original averages failed judgements in as -1 for both, and joins answers by position;
    here failures are left out and counted (`--as-original` averages them in), and joins are by id.

    Source: LLaVA's llava/eval/{eval_gpt_review_bench,summarize_gpt_review}.py.
    """

    name = "llava-bench"
    title = "LLaVA-Bench"
    folder = "llava-bench-in-the-wild"
    full_rows = 60
    max_new_tokens = 1024
    temperature = 0.2
    max_tokens = 1024

    def required(self) -> list[str]:
        """See the interface."""
        return ["questions.jsonl", "images", "context.jsonl", "answers_gpt4.jsonl"]

    def load_rows(self) -> list[Row]:
        """See the interface."""
        return self.llava_rows("questions.jsonl", "images")

    def _by(self, file: str, key: str, field: str) -> dict[str, Any]:
        path = self.root / file
        found = {}
        for number, record in read_json_lines(path, "judge's file"):
            if key not in record or field not in record:
                raise DataError(f"{path}:{number}: needs {key} and {field}")
            found[str(record[key])] = record[field]
        return found

    def truths(self) -> list[tuple[str, str]]:
        """The image's description and the reference answer for each row.

        Raises:
            DataError: a file is missing, or lacks a row that is asked.
        """
        contexts = self._by("context.jsonl", "image", "caption")
        answers = self._by("answers_gpt4.jsonl", "question_id", "text")
        references = []
        for row in self.rows:
            if not row.pictures:
                raise DataError(
                    f"{self.title}: question {row.question_id!r} has no image; the judge reads its "
                    "description in context.jsonl, so give the row its image"
                )
            image = row.pictures[0].name
            if image not in contexts:
                raise DataError(f"{self.root / 'context.jsonl'} has no image {image!r}")
            if str(row.question_id) not in answers:
                raise DataError(
                    f"{self.root / 'answers_gpt4.jsonl'} has no question {row.question_id!r}"
                )
            caption = contexts[image]
            lines = caption if isinstance(caption, list) else [caption]
            texts = [*lines, answers[str(row.question_id)]]
            if not all(isinstance(text, str) for text in texts):
                raise DataError(
                    f"{self.root}: the caption or the answer to question {row.question_id!r} in "
                    "context.jsonl and answers_gpt4.jsonl is no text"
                )
            references.append(("\n".join(lines), texts[-1]))
        return references

    def rule(self, category: str) -> str:
        """The rule that the judge gets: `rule.json` of the folder, or the released rule."""
        path = self.root / "rule.json"
        if not path.is_file():
            return RULE
        rules = read_json(path, "judge's rule")
        try:
            return str(rules[category]["prompt"])
        except (TypeError, KeyError):
            raise DataError(f"{path} has no prompt for {category}") from None

    def conversations(self, answers: Sequence[str | None]) -> list[list[dict[str, str]]]:
        """See the interface."""
        conversations = []
        texts = all_answered(self.title, self.rows, answers)
        for row, text, (context, reference) in zip(self.rows, texts, self.truths(), strict=True):
            content = (
                f"[Context]\n{context}\n\n[Question]\n{row.prompt}\n\n"
                f"[Assistant 1]\n{reference}\n\n[End of Assistant 1]\n\n"
                f"[Assistant 2]\n{text}\n\n[End of Assistant 2]\n\n"
                f"[System]\n{self.rule(_category(row))}\n\n"
            )
            system = {"role": "system", "content": SYSTEM}
            conversations.append([system, {"role": "user", "content": content}])
        return conversations

    def read_judgement(self, content: str) -> list[float] | None:
        """The two figures of the first line, for the reference and for the answer."""
        words = content.strip().split("\n")[0].replace(",", " ").split()
        try:
            figures = [float(word) for word in words]
        except ValueError:
            return None
        fits = len(figures) == 2 and all(math.isfinite(f) and 1 <= f <= 10 for f in figures)
        return figures if fits else None

    def review(self, number: int, content: str, figures: list[float] | None) -> dict[str, Any]:
        """A line as LLaVA writes it."""
        row = self.rows[number]
        return {
            "id": number + 1,
            "question_id": row.question_id,
            "category": _category(row),
            "content": content,
            "tuple": figures or FAILED,
        }

    def score_reviews(self, reviews: Sequence[dict[str, Any]]) -> Score:
        """See the interface."""
        partial = check_reviews(self, reviews)
        outcomes, groups, failed = [], dict[str, list[tuple[float, float]]](), 0
        for number, review in enumerate(reviews, start=1):
            pair = review.get("tuple")
            if not isinstance(pair, list) or len(pair) != 2 or not all(map(is_figure, pair)):
                raise DataError(f"review {number} of {self.title} has no tuple of two scores")
            reference, candidate = float(pair[0]), float(pair[1])
            bad = min(reference, candidate) < 0
            failed += bad
            text = "failed" if bad else f"{candidate:g} of 10, reference {reference:g}"
            outcomes.append(Outcome(None if bad else candidate / 10, text, ""))
            if not bad or self.options.as_original:
                groups.setdefault(str(review.get("category", "all")), []).append(
                    (reference, candidate)
                )
        judged = [outcome.credit for outcome in outcomes if outcome.credit is not None]
        lowest = ["every answer has the judge's lowest score"] * (max(judged, default=1) <= LOWEST)
        pairs = [pair for group in groups.values() for pair in group]
        if not pairs or sum(reference for reference, _ in pairs) <= 0:
            raise DataError(f"{self.title}: none of {len(reviews)} judgements succeeded")
        return Score(
            "relative to reference",
            _relative(pairs),
            figures={
                "reference x 10": 10 * mean(reference for reference, _ in pairs),
                "answers x 10": 10 * mean(candidate for _, candidate in pairs),
                "judged": len(reviews) - failed,
                "failed judgements": failed,
            },
            categories={
                name: Bar(_relative(group), len(group)) for name, group in sorted(groups.items())
            },
            notes=lowest + failed_note(failed, len(reviews), self.options.as_original) + partial,
            outcomes=outcomes,
        )


def _category(row: Row) -> str:
    return f"llava_bench_{row.category}"


def _relative(pairs: Sequence[tuple[float, float]]) -> float:
    reference = mean(reference for reference, _ in pairs)
    return 100 * mean(candidate for _, candidate in pairs) / reference if reference else 0.0
