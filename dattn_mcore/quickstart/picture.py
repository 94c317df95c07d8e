"""report.png: held-out mosaics with question and answer, accuracy, loss curves."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from PIL import Image

from dattn_mcore.evaluation.exact_match import ExactMatch
from dattn_mcore.evaluation.questions import Question, read_answers, read_questions
from dattn_mcore.quickstart.charts import RIGHT, WRONG, draw_report, draw_title
from dattn_mcore.quickstart.steps import QuickstartRun

_COLUMNS, _ROWS = 6, 2


def draw(run: QuickstartRun, result: ExactMatch) -> Path:
    """Draws the picture.

    Raises:
        DataError: it cannot be written.
    """
    return draw_report(run, result, lambda figure: _draw_examples(figure, run), without="places")


def choose_examples(
    questions: list[Question], answers: dict[str | int, str], count: int
) -> list[Question]:
    """The first of every category in turn, so that all kinds are seen; right or wrong alike."""
    groups: dict[str, list[Question]] = {}
    for question in questions:
        if question.images and question.question_id in answers:
            groups.setdefault(question.category, []).append(question)
    chosen: list[Question] = []
    while len(chosen) < count and any(groups.values()):
        for category in sorted(groups):
            if groups[category] and len(chosen) < count:
                chosen.append(groups[category].pop(0))
    return chosen


def _draw_examples(figure: Any, run: QuickstartRun) -> None:
    answers = read_answers(run.answers)
    examples = choose_examples(read_questions(run.questions), answers, _COLUMNS * _ROWS)
    draw_title(figure, "Held-out handwriting: question and generated answer")
    figure.subplots_adjust(left=0.03, right=0.97, bottom=0.03, top=0.80, wspace=0.18, hspace=0.55)
    grid = figure.subplots(_ROWS, _COLUMNS, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, question in zip(grid.flat, examples, strict=False):
        answer = answers[question.question_id].strip()
        right = answer == question.answer
        with Image.open(run.image_folder / question.images[0]) as image:
            axes.imshow(image.convert("L"), cmap="gray", vmin=0, vmax=255)
        height, width = image.height, image.width
        axes.axhline(height / 2 - 0.5, color="#3f4a5a", linewidth=1)
        axes.axvline(width / 2 - 0.5, color="#3f4a5a", linewidth=1)
        wrapped = textwrap.fill(question.text, 24)
        axes.text(0, 1.21, wrapped, transform=axes.transAxes, fontsize=9.5, va="center")
        said = f"{answer or '(nothing)'}" + ("" if right else f"   (it is {question.answer})")
        axes.text(
            0,
            1.01,
            said,
            transform=axes.transAxes,
            fontsize=11,
            fontweight="bold",
            va="bottom",
            color=RIGHT if right else WRONG,
        )
