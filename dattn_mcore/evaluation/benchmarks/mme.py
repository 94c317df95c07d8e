"""MME: two yes-or-no questions an image, 14 tasks."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path

from dattn_mcore.errors import DataError
from dattn_mcore.evaluation.benchmarks.base import (
    Benchmark,
    Row,
    all_answered,
    unanswered_note,
)
from dattn_mcore.evaluation.files import read_text, write_text
from dattn_mcore.evaluation.guessing import compare
from dattn_mcore.evaluation.outcome import Outcome
from dattn_mcore.evaluation.scores import Bar, Score, mean
from dattn_mcore.evaluation.text import SHORT_ANSWER, yes_or_no

PERCEPTION = [
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
]
COGNITION = ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"]
GUESSED_POINTS = 75.0  # of a task: half of the answers right, and both of an image in a quarter
ENDING = "Please answer yes or no."
IMAGES = "MME_Benchmark_release_version"


class Mme(Benchmark):
    """Each task: 100 x accuracy + 100 x share of images with both questions right.

    Source: MME's eval_tool/calculation.py, LLaVA's convert_answer_to_mme.py. Ground truth is
    joined by image and question; the space before "Please answer yes or no." is one or two.
    """

    name = "mme"
    title = "MME"
    folder = "MME"
    full_rows = 2374
    unique_ids = False  # an id is its image's
    scores = True
    submits = True

    def required(self) -> list[str]:
        """See the interface."""
        return ["llava_mme.jsonl", IMAGES]

    def load_rows(self) -> list[Row]:
        """See the interface; every image must be asked about exactly twice.

        Raises:
            DataError: the pairs are broken, or an id is no path of an image.
        """
        rows = self.llava_rows("llava_mme.jsonl", IMAGES)
        pairs: dict[str, list[int]] = {}
        for number, row in enumerate(rows):
            if row.category not in (*PERCEPTION, *COGNITION):  # it would be in neither score
                raise DataError(
                    f"{self.title}: question {row.question_id!r} has category {row.category!r}; it "
                    f"must be one of {', '.join((*PERCEPTION, *COGNITION))}"
                )
            image = Path(str(row.question_id))
            if len(image.parts) < 2 or image.is_absolute() or ".." in image.parts:
                raise DataError(
                    f"{self.title}: question_id {row.question_id!r} must be an image's path below "
                    f"{IMAGES}, such as 'artwork/images/0.jpg'; the ground truth is found by it"
                )
            pairs.setdefault(str(row.question_id), []).append(number)
        for question_id, numbers in pairs.items():
            if len(numbers) != 2:
                raise DataError(
                    f"{self.title}: image {question_id!r} has {len(numbers)} questions; every "
                    "image has two, so the question file is cut or damaged"
                )
            tasks = [rows[number].category for number in numbers]
            if tasks[0] != tasks[1]:
                raise DataError(
                    f"{self.title}: image {question_id!r} has questions of two categories, "
                    f"{' and '.join(tasks)}; both must be of one"
                )
            one, other = (_bare(rows[number].prompt) for number in numbers)
            if one == other:
                raise DataError(
                    f"{self.title}: image {question_id!r} has the question {one!r} twice; every "
                    "image has two, so the question file is damaged"
                )
        return rows

    def join_key(self, question_id: str | int, prompt: str) -> Hashable:
        """Image and question, since each image id stands twice."""
        return str(question_id), _bare(prompt)

    def together(self, row: Row) -> Hashable:
        """Both questions of an image."""
        return str(row.question_id)

    def pairs(self) -> list[tuple[int, int]]:
        """Row numbers of the two questions of every image."""
        found: dict[str, list[int]] = {}
        for number, row in enumerate(self.rows):
            found.setdefault(str(row.question_id), []).append(number)
        return [(a, b) for a, b in found.values()]

    def truths(self) -> list[tuple[str, str]]:
        """The original question and yes or no, for each row.

        Raises:
            DataError: a ground truth file or a question in it is missing.
        """
        files: dict[Path, dict[str, tuple[str, str]]] = {}
        truths = []
        for row in self.rows:
            image = Path(str(row.question_id))
            folder = self.root / IMAGES / image.parts[0]
            names = (folder / "questions_answers_YN", folder)
            candidates = [name / f"{image.stem}.txt" for name in names]
            path = next((path for path in candidates if path.is_file()), None)
            if path is None:
                raise DataError(f"{self.title}: ground truth {candidates[0]} is not there")
            if path not in files:
                files[path] = _read_truth(path)
            found = files[path].get(_bare(row.prompt))
            if found is None:
                raise DataError(f"{path} has no question {_bare(row.prompt)!r}, which is asked")
            truths.append(found)
        return truths

    def score(self, answers: Sequence[str | None]) -> Score:
        """See the interface."""
        truths = self.truths()
        outcomes = []
        for answer, (_, truth) in zip(answers, truths, strict=True):
            parsed = yes_or_no(_cell(answer or ""))
            outcomes.append(Outcome(float(parsed == truth), parsed, truth))
        right: dict[str, list[float]] = {}
        both: dict[str, list[float]] = {}
        for pair in self.pairs():
            task = self.rows[pair[0]].category
            hits = [outcomes[i].credit or 0.0 for i in pair]
            right.setdefault(task, []).extend(hits)
            both.setdefault(task, []).append(min(hits))
        tasks = {task: 100 * mean(right[task]) + 100 * mean(both[task]) for task in right}
        other = sum(o.parsed == "other" for o in outcomes)
        absent = [task for task in (*PERCEPTION, *COGNITION) if task not in tasks]
        notes = unanswered_note(answers)
        if other:
            notes.append(f"{other} answers are neither yes nor no")
        if absent:
            notes.append(f"the questions lack {len(absent)} of 14 tasks: {', '.join(absent)}")
        guesses = []
        for figure, group in (("perception", PERCEPTION), ("cognition", COGNITION)):
            credits = [
                outcome.credit
                for outcome, row in zip(outcomes, self.rows, strict=True)
                if row.category in group
            ]
            guesses += compare(figure, credits, [0.5] * len(credits))
        perception = sum(tasks.get(task, 0.0) for task in PERCEPTION)
        return Score(
            "perception",
            perception,
            unit="points",
            figures={"cognition": sum(tasks.get(task, 0.0) for task in COGNITION)},
            categories={task: Bar(v, len(right[task]), most=200.0) for task, v in tasks.items()},
            notes=notes,
            outcomes=outcomes,
            guessing=GUESSED_POINTS * sum(task in tasks for task in PERCEPTION),
            guesses=guesses,
        )

    def submit(self, answers: Sequence[str | None], folder: Path, name: str) -> Path:
        """One file a task for MME's own calculation.py: image, question, truth, answer.

        Tabs and line breaks in an answer become spaces, which the tool's format needs.
        """
        truths = self.truths()
        texts = all_answered(self.title, self.rows, answers)
        lines: dict[str, list[str]] = {}
        for pair in self.pairs():
            for i in pair:
                question, truth = truths[i]
                cells = Path(str(self.rows[i].question_id)).name, question, truth.capitalize()
                line = "\t".join((*cells, _cell(texts[i])))
                lines.setdefault(self.rows[i].category, []).append(line)
        target = folder / name
        for task, text in lines.items():
            write_text(target / f"{task}.txt", "\n".join(text) + "\n", "submission")
        return target


def _cell(answer: str) -> str:
    """An answer as it stands in the tool's file: what is scored here is what the tool reads."""
    return " ".join(answer.split())


def _bare(question: str) -> str:
    """A question without its suffix, with single spaces."""
    question = question.removesuffix(SHORT_ANSWER).strip().removesuffix(ENDING)
    return " ".join(question.split())


def _read_truth(path: Path) -> dict[str, tuple[str, str]]:
    truths = {}
    for number, line in enumerate(read_text(path, "ground truth").splitlines(), start=1):
        if not line.strip():
            continue
        question, tab, answer = line.rpartition("\t")
        if not tab or answer.strip().lower() not in ("yes", "no"):
            raise DataError(f"{path}:{number}: must be a question, a tab, and Yes or No")
        truths[_bare(question)] = (question, answer.strip().lower())
    return truths
