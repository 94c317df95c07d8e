"""report.png of the videos: film strips of held-out videos with question and answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dattn_mcore.data.media.video.probe import probe_video
from dattn_mcore.data.media.video.reader import read_frames
from dattn_mcore.data.media.video.sampling import times_of
from dattn_mcore.data.media.video.settings import VideoLimits, VideoSampling
from dattn_mcore.evaluation.exact_match import ExactMatch
from dattn_mcore.evaluation.questions import read_answers
from dattn_mcore.quickstart.charts import MUTED, RIGHT, WRONG, draw_report, draw_title
from dattn_mcore.quickstart.steps import QuickstartRun
from dattn_mcore.quickstart.video_score import VideoTask, read_tasks

_COLUMNS, _ROWS = 2, 4
_GAP = 3  # pixels between two frames of a strip
_PAPER = 255


@dataclass(frozen=True)
class Frames:
    """Sampled frames of a video: uint8 [frames, height, width], grey, and their seconds."""

    pixels: np.ndarray
    times: Sequence[float]


def read_frames_of(path: Path, fps: float) -> Frames:
    """Frames of a video file at so many a second, as the model gets them.

    Raises:
        DataError: the file cannot be read.
    """
    limits = VideoLimits()
    times = times_of(probe_video(str(path), path, limits), VideoSampling(policy="fps", fps=fps))
    pixels = read_frames(str(path), path, times, resize=lambda frame: frame, limits=limits)
    return Frames(pixels[:, 0].numpy(), times)


def draw(run: QuickstartRun, result: ExactMatch, read: Callable[[Path], Frames]) -> Path:
    """Draws the picture.

    Args:
        run: where the results are.
        result: the score.
        read: samples frames of a video file, as the model got them.

    Raises:
        DataError: a video cannot be read, or the picture not written.
    """
    return draw_report(
        run, result, lambda figure: _draw_examples(figure, run, read), without="times"
    )


def strip(pixels: np.ndarray) -> np.ndarray:
    """Frames side by side.

    Args:
        pixels: uint8 [frames, height, width].

    Returns:
        uint8 [height, frames * (width + gap) - gap].
    """
    frames, height, width = pixels.shape
    wide = np.full((frames, height, width + _GAP), _PAPER, np.uint8)
    wide[:, :, :width] = pixels
    return wide.transpose(1, 0, 2).reshape(height, -1)[:, : frames * (width + _GAP) - _GAP]


def choose_examples(tasks: Sequence[VideoTask], count: int) -> list[VideoTask]:
    """The first of every category in turn, so that all kinds are seen; right or wrong alike."""
    groups: dict[str, list[VideoTask]] = {}
    for task in tasks:
        groups.setdefault(task.category, []).append(task)
    chosen: list[VideoTask] = []
    while len(chosen) < count and any(groups.values()):
        for category in sorted(groups):
            if groups[category] and len(chosen) < count:
                chosen.append(groups[category].pop(0))
    return chosen


def _draw_examples(figure: Any, run: QuickstartRun, read: Callable[[Path], Frames]) -> None:
    answers = read_answers(run.answers)
    examples = choose_examples(read_tasks(run.questions), _COLUMNS * _ROWS)
    draw_title(figure, "Held-out handwriting: question about a video, and generated answer")
    figure.subplots_adjust(left=0.03, right=0.97, bottom=0.05, top=0.84, wspace=0.08, hspace=0.95)
    grid = figure.subplots(_ROWS, _COLUMNS, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, task in zip(grid.flat, examples, strict=False):
        answer = answers[task.question_id].strip()
        right = answer == task.answer
        frames = read(run.image_folder / task.video)
        axes.imshow(strip(frames.pixels), cmap="gray", vmin=0, vmax=255)
        height, width = frames.pixels.shape[1:]
        for number, time in enumerate(frames.times):
            middle = number * (width + _GAP) + width / 2
            below = height + 4
            axes.text(
                middle, below, f"{time:g} s", ha="center", va="top", fontsize=7.5, color=MUTED
            )
        axes.text(0, 1.09, task.text, transform=axes.transAxes, fontsize=9.5, va="bottom")
        said = f"{answer or '(nothing)'}" + ("" if right else f"   (it is {task.answer})")
        axes.text(
            1,
            1.09,
            said,
            transform=axes.transAxes,
            fontsize=11,
            fontweight="bold",
            ha="right",
            va="bottom",
            color=RIGHT if right else WRONG,
        )
