"""What the pictures of the quickstarts have in common: colours, loss curves, accuracy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from dattn_mcore.errors import DataError
from dattn_mcore.evaluation.exact_match import ExactMatch
from dattn_mcore.quickstart.steps import QuickstartRun

INK, MUTED, GRID = "#1f2933", "#6b7280", "#e5e7eb"
RIGHT, WRONG = "#1a7f4b", "#c2362b"
STYLE = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_STAGE_COLOURS = ("#8a9bb0", "#3b6fb6", "#d97a1e")  # of the last stages


def draw_report(
    run: QuickstartRun, result: ExactMatch, draw_examples: Callable[[Any], None], without: str
) -> Path:
    """Draws the picture: examples above, losses and accuracy below.

    Args:
        run: where the results are.
        result: the score, with the level of guessing of each category.
        draw_examples: draws the examples on the figure it is given.
        without: what a guess does not know.

    Returns:
        The picture's file.

    Raises:
        DataError: it cannot be written.
    """
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(13, 9.4), dpi=130, facecolor="white")
        upper, lower = figure.subfigures(2, 1, height_ratios=(1.75, 1))
        draw_examples(upper)
        left, right = lower.subplots(1, 2, width_ratios=(2.1, 1))
        lower.subplots_adjust(left=0.06, right=0.97, bottom=0.17, top=0.86, wspace=0.2)
        _draw_losses(left, run)
        _draw_accuracy(right, result, without)
        try:
            figure.savefig(run.picture)
        except OSError as error:
            raise DataError(f"{run.picture} cannot be written ({error.strerror})") from None
        finally:
            plt.close(figure)
    return run.picture


def read_losses(path: Path) -> tuple[list[int], list[float]]:
    """Steps and losses of a run's metrics.jsonl, without steps that had nothing to learn from."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if row["loss"] is not None]
    return [row["step"] for row in rows], [row["loss"] for row in rows]


def draw_title(figure: Any, text: str) -> None:
    """Writes the heading of the examples."""
    figure.suptitle(text, x=0.03, y=0.965, ha="left", fontsize=14, fontweight="bold")


def _draw_losses(axes: Any, run: QuickstartRun) -> None:
    """Draws the losses of the stages one behind the other."""
    colours = dict(zip(run.stages, _STAGE_COLOURS[-len(run.stages) :], strict=True))
    start, highest = 0, 0.0
    for stage in run.stages:
        steps, losses = read_losses(run.metrics(stage))
        at = [start + step for step in steps]
        axes.plot(at, losses, color=colours[stage], linewidth=2)
        highest = max(highest, *losses)
        if run.validation(stage).exists():
            steps, losses = read_losses(run.validation(stage))
            places = [start + step for step in steps]
            axes.plot(places, losses, color=INK, linewidth=0, marker="o", markersize=4)
            highest = max(highest, *losses)
        if start:
            axes.axvline(start, color=GRID, linewidth=1, zorder=0)
        axes.text(
            (start + at[-1]) / 2,
            1.02,
            stage,
            transform=axes.get_xaxis_transform(),
            ha="center",
            color=colours[stage],
            fontweight="bold",
        )
        start = at[-1]
    axes.set(xlim=(0, start), ylim=(0, highest * 1.05), xlabel="optimizer step", ylabel="loss")
    axes.set_title(
        "Loss per stage: training (lines), held-out (dots)", loc="left", fontweight="bold", pad=22
    )
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _draw_accuracy(axes: Any, result: ExactMatch, without: str) -> None:
    """Draws the accuracy of each kind of question beside the best guess."""
    names = list(result.categories)
    values = [result.categories[name].accuracy * 100 for name in names]
    ceilings = [100 * (result.guessing(name) or 0.0) for name in (*names, "overall")]
    names.append("all")
    values.append(result.overall.accuracy * 100)
    places = list(range(len(names)))[::-1]
    axes.barh(places, values, height=0.56, color=_STAGE_COLOURS[1])
    for place, value, ceiling in zip(places, values, ceilings, strict=True):
        inside = value > ceiling + 20
        at = value - 2 if inside else max(value, ceiling) + 2
        axes.text(
            at,
            place,
            f"{value:.1f} %",
            va="center",
            ha="right" if inside else "left",
            color="white" if inside else INK,
            fontweight="bold",
        )
        axes.plot([ceiling] * 2, [place - 0.36, place + 0.36], color=WRONG, linewidth=2)
    axes.set(xlim=(0, 100), yticks=places, yticklabels=names)
    axes.set_xlabel(f"% right   (red: best without {without})")
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines["left"].set_visible(False)
    axes.set_title("Held-out accuracy", loc="left", fontweight="bold", pad=22)
