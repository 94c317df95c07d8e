"""The score of the questions about videos, beside the best guess without the time.

Every question file of the digits videos says how often the best guess is right of one who knows
all frames and not their order (`guess`); it is counted, not estimated
(`data.video_digits_questions`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from dattn_mcore.errors import DataError
from dattn_mcore.evaluation.exact_match import ExactMatch, score_file, write_score
from dattn_mcore.evaluation.files import read_json_lines
from dattn_mcore.quickstart.steps import QuickstartRun


@dataclass(frozen=True)
class VideoTask:
    """A question about a video, as its file has it.

    Attributes:
        question_id: unique in its file.
        video: path below the video folder.
        text: what is asked.
        category: group for the score.
        answer: expected.
        guess: how often the best guess without the order of the frames is right, 0 to 1.
    """

    question_id: str
    video: str
    text: str
    category: str
    answer: str
    guess: float


def read_tasks(path: Path) -> list[VideoTask]:
    """Reads a question file of the digits videos.

    Raises:
        DataError: it is missing, or a line (named) is not one of `prepare-video-digits`.
    """
    tasks = []
    for number, record in read_json_lines(path, "--questions"):
        try:
            tasks.append(VideoTask(**record))
        except TypeError:
            raise DataError(
                f"{path}:{number}: no question of the digits videos; prepare them again"
            ) from None
    return tasks


def best_guess(tasks: list[VideoTask]) -> float:
    """Accuracy of the best guess without the time, over all questions."""
    return fmean(task.guess for task in tasks)


def score(run: QuickstartRun) -> ExactMatch:
    """Compares the answers with the expected ones; writes score.json."""
    guesses: dict[str, list[float]] = {}
    for task in read_tasks(run.questions):
        guesses.setdefault(task.category, []).append(task.guess)
    result = score_file(run.questions, run.answers, lambda category: fmean(guesses[category]))
    write_score(run.score, result)
    return result
