"""The embedded video data set: real handwriting that appears and moves, made from the digits.

A video is 4 s of 56 x 56 pixels, VP9 at 8 frames a second. In every second one handwritten digit
stands in one cell of a 2 x 2 grid of 28 x 28 pixels, light on dark. In three of four videos four
different digits appear one after the other, each anywhere; in every fourth one digit goes on to a
neighbouring cell three times. Digits of the training videos and of the held-out ones are those of
the images' two parts (`data.digits`): other handwriting, and hardly a writer in both.

Written below the output folder:
    videos/{train,heldout}/NN/NNNNN.webm
    video_instruct.json             conversations of one to four questions
    heldout_video_instruct.json     the questions of the file below, for the held-out loss
    heldout_questions.jsonl         {question_id, video, text, category, answer, guess}; guess: how
                                    often the best guess is right without the order of the frames
    tokenizer.model                 the images' own, with words of time
    prepared.json                   what made it; written last
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dattn_mcore.data.digits_drawing import CELL_PIXELS, HELD_OUT_SHARE, draw_cells, load_digits
from dattn_mcore.data.digits_questions import all_texts
from dattn_mcore.data.prepared_folder import prepare_folder
from dattn_mcore.data.tokenizer import train_tokenizer
from dattn_mcore.data.video_digits_questions import (
    BEATS,
    Beats,
    as_record,
    conversation,
    held_out_question,
)
from dattn_mcore.data.video_digits_words import write_tokenizer
from dattn_mcore.data.vp9 import write_vp9

_VERSION = 1  # raise it when the same sizes would write other files
FRAME_RATE = 8  # frames a second
_SHOWN = 7  # frames of a second in which an appearing digit is there
_STILL = 5  # frames of a second in which a moving digit rests; then it goes to the next cell
_MOVES = 4  # of so many videos, one has a digit that moves


@dataclass(frozen=True)
class VideoDigitsSizes:
    """What is made; the same values give the same frames, and the same files of one encoder.

    Attributes:
        train: videos of the training part, one conversation each.
        heldout: videos of held-out digits, one question each.
        seed: of every choice.
        vocab_size: of the images' tokenizer, and so of this one.
    """

    train: int = 3000
    heldout: int = 400
    seed: int = 20251
    vocab_size: int = 384


def prepare_video_digits(output: str | Path, sizes: VideoDigitsSizes | None = None) -> Path:
    """Writes the data set, unless it is there already.

    Args:
        output: folder to make, for example `data/video_digits`.
        sizes: sizes and seed; None: the defaults.

    Returns:
        The folder.

    Raises:
        DataError: PyAV is missing, the folder holds something else, or it cannot be written.
    """
    sizes = sizes or VideoDigitsSizes()
    made_of = {"version": _VERSION, "plan": asdict(sizes)}
    return prepare_folder(
        Path(output), "video digits", made_of, lambda folder: _write(folder, sizes)
    )


def _write(folder: Path, sizes: VideoDigitsSizes) -> None:
    """Makes `folder` with everything in it but the marker."""
    folder.mkdir()
    rng = np.random.Generator(np.random.PCG64(sizes.seed))
    images, labels = load_digits()
    held_out = round(len(labels) * HELD_OUT_SHARE)
    train = _write_videos(
        folder, "train", images[held_out:], labels[held_out:], sizes.train, rng, vary=True
    )
    heldout = _write_videos(
        folder, "heldout", images[:held_out], labels[:held_out], sizes.heldout, rng, vary=False
    )
    records = [
        conversation(f"video-{number:05d}", path, beats, rng)
        for number, (path, beats) in enumerate(train)
    ]
    questions = [
        held_out_question(f"heldout-{number:04d}", path, beats, rng)
        for number, (path, beats) in enumerate(heldout)
    ]
    _write_records(folder / "video_instruct.json", records)
    _write_records(folder / "heldout_video_instruct.json", [as_record(q) for q in questions])
    (folder / "heldout_questions.jsonl").write_text(
        "".join(json.dumps(question) + "\n" for question in questions), "utf-8"
    )
    of_images = folder / "images.model"
    train_tokenizer(all_texts(), of_images, sizes.vocab_size)
    write_tokenizer(of_images, folder / "tokenizer.model", sorted(set(all_texts())))
    of_images.unlink()


def _write_records(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n", "utf-8")


def _write_videos(
    folder: Path,
    split: str,
    images: np.ndarray,
    labels: np.ndarray,
    count: int,
    rng: np.random.Generator,
    vary: bool,
) -> list[tuple[str, Beats]]:
    """Draws and saves videos.

    Args:
        folder: output folder.
        split: folder below `videos`.
        images: float32 [n, 8, 8] digits of the split.
        labels: int [n].
        count: videos.
        rng: source of every choice.
        vary: also shift, scale and turn each digit a little (training only).

    Returns:
        Of each the path below `videos`, and what it shows.
    """
    by_label = [np.flatnonzero(labels == digit) for digit in range(10)]
    shown = [_draw_beats(moves=number % _MOVES == 0, rng=rng) for number in range(count)]
    chosen = np.array([[int(rng.choice(by_label[d])) for d in beats.digits] for beats in shown])
    for row, beats in zip(chosen, shown, strict=True):
        if beats.moves:
            row[:] = row[0]  # it stays the digit of one hand
    ink = draw_cells(images, chosen.reshape(-1), rng, vary)
    ink = ink.reshape(count, BEATS, CELL_PIXELS, CELL_PIXELS)
    paths = [f"{split}/{number // 1000:02d}/{number:05d}.webm" for number in range(count)]
    for parent in sorted({Path(path).parent for path in paths}):
        (folder / "videos" / parent).mkdir(parents=True)

    def save(number: int) -> None:
        write_vp9(folder / "videos" / paths[number], frames_of(shown[number], ink[number]))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(save, range(count)))
    return list(zip(paths, shown, strict=True))


def _draw_beats(moves: bool, rng: np.random.Generator) -> Beats:
    if not moves:
        digits = tuple(int(digit) for digit in rng.permutation(10)[:BEATS])
        return Beats(digits, tuple(int(cell) for cell in rng.integers(4, size=BEATS)))
    cells = [int(rng.integers(4))]
    while len(cells) < BEATS:
        cells.append(cells[-1] ^ int(rng.choice((1, 2))))
    return Beats((int(rng.integers(10)),) * BEATS, tuple(cells))


def frames_of(beats: Beats, ink: np.ndarray) -> np.ndarray:
    """Draws the frames of a video.

    Args:
        beats: what it shows.
        ink: uint8 [beats, 28, 28], the digit of each beat.

    Returns:
        uint8 [beats * FRAME_RATE, 56, 56].
    """
    frames = np.zeros((len(ink) * FRAME_RATE, 2 * CELL_PIXELS, 2 * CELL_PIXELS), np.uint8)
    for number, frame in enumerate(frames):
        beat, of_beat = divmod(number, FRAME_RATE)
        last = beat == len(ink) - 1
        if not beats.moves and of_beat >= _SHOWN:
            continue
        place = np.array(divmod(beats.cells[beat], 2)) * CELL_PIXELS
        if beats.moves and not last and of_beat >= _STILL:
            goal = np.array(divmod(beats.cells[beat + 1], 2)) * CELL_PIXELS
            place += (goal - place) * (of_beat - _STILL + 1) // (FRAME_RATE - _STILL + 1)
        row, column = place
        frame[row : row + CELL_PIXELS, column : column + CELL_PIXELS] = ink[beat]
    return frames
