"""report.png: held-out mosaics with question and answer, accuracy, loss curves."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from PIL import Image

from dattn_mcore.data.digits_questions import bag_of_digits_ceiling
from dattn_mcore.errors import DataError
from dattn_mcore.evaluation.exact_match import ExactMatch
from dattn_mcore.evaluation.questions import Question, read_answers, read_questions
from dattn_mcore.quickstart.steps import STAGES, QuickstartRun

_COLUMNS, _ROWS = 6, 2
_INK, _MUTED, _GRID = "#1f2933", "#6b7280", "#e5e7eb"
_RIGHT, _WRONG = "#1a7f4b", "#c2362b"
_STAGE_COLOURS = dict(zip(STAGES, ("#8a9bb0", "#3b6fb6", "#d97a1e"), strict=True))


def draw(run: QuickstartRun, result: ExactMatch) -> Path:
    """Draws the picture.

    Raises:
        DataError: it cannot be written.
    """
    with plt.rc_context(
        {
            "font.size": 10,
            "text.color": _INK,
            "axes.labelcolor": _MUTED,
            "xtick.color": _MUTED,
            "ytick.color": _MUTED,
            "axes.edgecolor": _GRID,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    ):
        figure = plt.figure(figsize=(13, 9.4), dpi=130, facecolor="white")
        upper, lower = figure.subfigures(2, 1, height_ratios=(1.75, 1))
        _draw_examples(upper, run)
        left, right = lower.subplots(1, 2, width_ratios=(2.1, 1))
        lower.subplots_adjust(left=0.06, right=0.97, bottom=0.17, top=0.86, wspace=0.2)
        _draw_losses(left, run)
        _draw_accuracy(right, result)
        try:
            figure.savefig(run.picture)
        except OSError as error:
            raise DataError(f"{run.picture} cannot be written ({error.strerror})") from None
        finally:
            plt.close(figure)
    return run.picture


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


def read_losses(path: Path) -> tuple[list[int], list[float]]:
    """Steps and losses of a run's metrics.jsonl, without steps that had nothing to learn from."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["loss"] is not None]
    return [row["step"] for row in rows], [row["loss"] for row in rows]


def _draw_examples(figure: Any, run: QuickstartRun) -> None:
    answers = read_answers(run.answers)
    examples = choose_examples(read_questions(run.questions), answers, _COLUMNS * _ROWS)
    figure.suptitle(
        "Held-out handwriting: question and generated answer",
        x=0.03,
        y=0.965,
        ha="left",
        fontsize=14,
        fontweight="bold",
    )
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
            color=_RIGHT if right else _WRONG,
        )


def _draw_losses(axes: Any, run: QuickstartRun) -> None:
    start, highest = 0, 0.0
    for stage in STAGES:
        steps, losses = read_losses(run.metrics(stage))
        at = [start + step for step in steps]
        axes.plot(at, losses, color=_STAGE_COLOURS[stage], linewidth=2)
        highest = max(highest, *losses)
        if run.validation(stage).exists():
            steps, losses = read_losses(run.validation(stage))
            places = [start + step for step in steps]
            axes.plot(places, losses, color=_INK, linewidth=0, marker="o", markersize=4)
            highest = max(highest, *losses)
        if start:
            axes.axvline(start, color=_GRID, linewidth=1, zorder=0)
        axes.text(
            (start + at[-1]) / 2,
            1.02,
            stage,
            transform=axes.get_xaxis_transform(),
            ha="center",
            color=_STAGE_COLOURS[stage],
            fontweight="bold",
        )
        start = at[-1]
    axes.set(xlim=(0, start), ylim=(0, highest * 1.05), xlabel="optimizer step", ylabel="loss")
    axes.set_title(
        "Loss per stage: training (lines), held-out (dots)", loc="left", fontweight="bold", pad=22
    )
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _draw_accuracy(axes: Any, result: ExactMatch) -> None:
    names = list(result.categories)
    values = [result.categories[name].accuracy * 100 for name in names]
    ceilings = [bag_of_digits_ceiling(name) * 100 for name in names]
    blind = sum(c * t.total for c, t in zip(ceilings, result.categories.values(), strict=True))
    names.append("all")
    values.append(result.overall.accuracy * 100)
    ceilings.append(blind / result.overall.total)
    places = list(range(len(names)))[::-1]
    axes.barh(places, values, height=0.56, color=_STAGE_COLOURS["pretrain"])
    for place, value, ceiling in zip(places, values, ceilings, strict=True):
        inside = value > ceiling + 20
        at = value - 2 if inside else max(value, ceiling) + 2
        axes.text(
            at,
            place,
            f"{value:.1f} %",
            va="center",
            ha="right" if inside else "left",
            color="white" if inside else _INK,
            fontweight="bold",
        )
        axes.plot([ceiling] * 2, [place - 0.36, place + 0.36], color=_WRONG, linewidth=2)
    axes.set(xlim=(0, 100), yticks=places, yticklabels=names)
    axes.set_xlabel("% right   (red: best without places)")
    axes.tick_params(axis="y", length=0, labelcolor=_INK)
    axes.spines["left"].set_visible(False)
    axes.set_title("Held-out accuracy", loc="left", fontweight="bold", pad=22)
