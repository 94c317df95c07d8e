"""POPE: is there such an object? Three ways to choose the objects that are not there."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence

from dattn_mcore.errors import ConfigError, DataError
from dattn_mcore.evaluation.benchmarks.base import Benchmark, Row, unanswered_note
from dattn_mcore.evaluation.files import read_json_lines
from dattn_mcore.evaluation.guessing import compare
from dattn_mcore.evaluation.outcome import Outcome
from dattn_mcore.evaluation.scores import Bar, Score, mean
from dattn_mcore.evaluation.text import SHORT_ANSWER, says_no

# The first release says "imange" in some questions and labels; the corrected one says "image".
FIRST_RANDOM_ROWS = 2910  # the corrected release has 3,000
MISSPELT = re.compile(r"\bimange\b")
SPLITS = ("random", "popular", "adversarial")


class Pope(Benchmark):
    """Mean F1 of the splits; accuracy, precision, recall, F1 and share of yes of each.

    Labels are joined by image and question, however these spell "image". The original joins by
    position, which is silently wrong for the newer label file of `random` (3,000 rows against
    2,910 that are asked); `--as-original` does as it did.

    Source: LLaVA's llava/eval/eval_pope.py.
    """

    name = "pope"
    title = "POPE"
    folder = "pope"
    full_rows = 8910
    scores = True

    def required(self) -> list[str]:
        """See the interface."""
        labels = [f"coco/coco_pope_{split}.json" for split in SPLITS]
        return ["llava_pope_test.jsonl", "val2014", *labels]

    def load_rows(self) -> list[Row]:
        """See the interface."""
        rows = self.llava_rows("llava_pope_test.jsonl", "val2014")
        strange = {row.category for row in rows} - set(SPLITS)
        if strange:
            raise DataError(
                f"{self.title}: category {sorted(strange)[0]!r} is none of {', '.join(SPLITS)}"
            )
        return rows

    def together(self, row: Row) -> Hashable:
        """All questions of a split about an image: as many of yes as of no."""
        return row.category, row.pictures[0].name if row.pictures else ""

    def _label_file(self, split: str) -> list[tuple[tuple[str, str], str]]:
        """Image and question, and yes or no, in the order of the label file."""
        path = self.root / f"coco/coco_pope_{split}.json"
        labels = []
        for number, record in read_json_lines(path, "annotation file"):
            label = str(record.get("label")).lower()
            if label not in ("yes", "no"):
                raise DataError(f"{path}:{number}: label is {record.get('label')!r}, not yes or no")
            key = str(record.get("image")), _question(str(record.get("text")))
            labels.append((key, label))
        return labels

    def labels(self) -> tuple[list[str], list[str]]:
        """Yes or no for each row, and what is unusual about the label files.

        Raises:
            DataError: a label file is missing or lacks a row that is asked.
            ConfigError: labels are to be joined by position, to a part of the rows.
        """
        truths: dict[int, str] = {}
        notes = []
        whole = len(self.rows) == len(self.all_rows)
        if self.options.as_original and not whole:
            raise ConfigError(
                f"{self.title}: --as-original joins labels by position, which --limit changes; "
                "leave one of them out"
            )
        for split in dict.fromkeys(row.category for row in self.rows):
            labels = self._label_file(split)
            numbers = [i for i, row in enumerate(self.rows) if row.category == split]
            if whole and len(labels) != len(numbers):
                notes.append(
                    f"{split}: {len(numbers)} rows are asked, the label file has {len(labels)}"
                )
            if self.options.as_original:
                if len(labels) < len(numbers):
                    raise DataError(
                        f"{self.title} {split}: {len(labels)} labels for {len(numbers)} rows; "
                        "joining by position (--as-original) needs as many"
                    )
                truths |= {i: label for i, (_, label) in zip(numbers, labels, strict=False)}
                notes.append(f"{split}: labels joined by position, as in the original")
                continue
            by_question = dict(labels)
            contrary = [key for key, label in labels if by_question[key] != label]
            if contrary:  # one of the two would be left out
                raise DataError(
                    f"{self.root}/coco/coco_pope_{split}.json has yes and no for image "
                    f"{contrary[0][0]!r}, {contrary[0][1]!r}; take the file anew"
                )
            for i in numbers:
                row = self.rows[i]
                key = row.pictures[0].name if row.pictures else "", _question(row.prompt)
                if key not in by_question:
                    raise DataError(
                        f"{self.root}/coco/coco_pope_{split}.json has no label for image "
                        f"{key[0]!r}, {key[1]!r}, which is asked; the questions are "
                        f"{self._release()}: take its label files"
                    )
                truths[i] = by_question[key]
        return [truths[i] for i in range(len(self.rows))], notes

    def _release(self) -> str:
        """Which release the questions are of, for messages."""
        misspelt = sum(bool(MISSPELT.search(row.prompt)) for row in self.all_rows)
        count = sum(row.category == "random" for row in self.all_rows)
        if not misspelt and count != FIRST_RANDOM_ROWS:
            return "of the corrected release (3,000 rows of random, no 'imange')"
        return (
            f"of the first release ({FIRST_RANDOM_ROWS:,} rows of random, with 'imange' in "
            f"{misspelt} of {len(self.all_rows)})"
        )

    def check_truth(self) -> list[str]:
        """See the interface."""
        return self.labels()[1]

    def score(self, answers: Sequence[str | None]) -> Score:
        """See the interface."""
        truths, notes = self.labels()
        outcomes = []
        for answer, truth in zip(answers, truths, strict=True):
            parsed = "" if answer is None else "no" if says_no(answer) else "yes"
            outcomes.append(Outcome(float(parsed == truth), parsed, truth))
        figures: dict[str, float] = {}
        categories: dict[str, Bar] = {}
        for split in SPLITS:
            group = [o for o, row in zip(outcomes, self.rows, strict=True) if row.category == split]
            if group:
                values = binary_figures(group)
                figures |= {f"{split} {name}": value for name, value in values.items()}
                categories[split] = Bar(values["F1"], len(group))
        absent = [split for split in SPLITS if split not in categories]
        if absent:
            notes.append(f"not asked: {', '.join(absent)}")
        return Score(
            "mean F1",
            mean(bar.value for bar in categories.values()),
            figures=figures,
            categories=categories,
            notes=notes + unanswered_note(answers),
            outcomes=outcomes,
            guessing=mean(self._always_yes(truths).values()),
            guesses=compare("accuracy", [o.credit for o in outcomes], [0.5] * len(outcomes)),
        )

    def _always_yes(self, truths: Sequence[str]) -> dict[str, float]:
        """F1 of each split for yes to every question, which no guess without looking exceeds."""
        shares: dict[str, list[float]] = {}
        for row, truth in zip(self.rows, truths, strict=True):
            shares.setdefault(row.category, []).append(truth == "yes")
        return {split: 200 * mean(s) / (1 + mean(s)) for split, s in shares.items()}


def binary_figures(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Accuracy, precision, recall, F1 and share of yes, in percent; 0 where undefined.

    A row without an answer has the wrong one: a yes where no is right, so that it is no row less.
    """

    def count(parsed: str, truth: str) -> int:
        return sum(o.parsed == parsed and o.truth == truth for o in outcomes)

    def share(part: float, whole: float) -> float:
        return 100 * part / whole if whole else 0.0

    hits = count("yes", "yes")
    says_yes = hits + count("yes", "no") + count("", "no")
    is_yes = sum(o.truth == "yes" for o in outcomes)
    precision, recall = share(hits, says_yes), share(hits, is_yes)
    return {
        "accuracy": share(hits + count("no", "no"), len(outcomes)),
        "precision": precision,
        "recall": recall,
        "F1": 2 * precision * recall / (precision + recall) if hits else 0.0,
        "yes ratio": share(sum(o.parsed == "yes" for o in outcomes), len(outcomes)),
    }


def _question(text: str) -> str:
    return MISSPELT.sub("image", " ".join(text.removesuffix(SHORT_ANSWER).split()))
