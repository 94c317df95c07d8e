"""Frames a second of the video reader, beside decord2 and transformers' PyAV reader.

    python -m benchmarks.video_reading
    python -m benchmarks.video_reading --write-docs      # and its section of docs/video.md

VP9 videos are made once. Each reader gives the same frames, one a second, resized to the same
square by the same function; they take turns by the wall clock, and the machine should be idle. Two
threads decode, where a reader can be told (transformers' sets none). decord2 (not among this
project's packages) is left out where it is not installed. transformers' video processors resize
with torchvision, which is not among them either: its reader (`transformers.video_utils.load_video`)
is measured, with this project's resize. Exit status 1: below 0.9 of decord2's frames a second or
1.5 times transformers', or frames that differ.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.video_utils import load_video

from benchmarks.measure import seconds_in_turn
from benchmarks.results import (
    ROOT,
    add_arguments,
    hand_over,
    markdown_table,
    provenance,
    write_section,
)
from dattn_mcore.data.media.video.probe import library, probe_video
from dattn_mcore.data.media.video.reader import read_frames
from dattn_mcore.data.media.video.sampling import times_of
from dattn_mcore.data.media.video.settings import VideoLimits, VideoSampling
from dattn_mcore.data.resize import to_tile
from dattn_mcore.parallel import platform
from dattn_mcore.parallel.packages import import_problem

NAME, MODULE = "video-reading", "benchmarks.video_reading"
SIZE, RATE, THREADS = 384, 30, 2
LEAST = {"decord2": 0.9, "transformers": 1.5}  # of their frames a second
SIZES = {"360p": (640, 360), "720p": (1280, 720)}


def make_video(path: Path, size: tuple[int, int], seconds: int) -> None:
    """Moving shapes over noise, VP9 in MP4."""
    av, draw = library(), np.random.default_rng(0)
    width, height = size
    ground = draw.integers(0, 64, (height, width, 3), np.uint8)
    with av.open(str(path), "w", format="mp4") as output:
        stream = output.add_stream("libvpx-vp9", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.bit_rate, stream.options = 2_000_000, {"deadline": "realtime", "cpu-used": "8"}
        for number in range(seconds * RATE):
            image = np.roll(ground, number, axis=1)
            left, top = number * 5 % (width - 80), number * 3 % (height - 80)
            image[top : top + 80, left : left + 80] = (number % 256, 200, 90)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            output.mux(stream.encode(frame))
        output.mux(stream.encode())


def resized(frames: Any) -> Tensor:
    """uint8 [frames, 3, SIZE, SIZE] from uint8 [frames, height, width, 3]."""
    return torch.stack([_tile(torch.from_numpy(one).permute(2, 0, 1)) for one in frames])


def _tile(frame: Tensor) -> Tensor:
    return to_tile(frame.contiguous(), SIZE, "stretch", (127, 127, 127))


def readers(path: Path) -> dict[str, Callable[[], Tensor]]:
    """What reads a second's first frame each, by name."""
    limits, sampling = VideoLimits(), VideoSampling(fps=1)

    def ours() -> Tensor:
        times = times_of(probe_video(path.name, path, limits), sampling)
        return read_frames(path.name, path, times, resize=_tile, limits=limits, threads=THREADS)

    def indices(frames: int) -> list[int]:
        return list(range(0, frames, RATE))

    def theirs() -> Tensor:
        def chosen(metadata: Any, **_: Any) -> np.ndarray:
            return np.array(indices(metadata.total_num_frames))

        frames, _ = load_video(str(path), backend="pyav", sample_indices_fn=chosen)
        return resized(frames)

    found: dict[str, Callable[[], Tensor]] = {"ours": ours, "transformers": theirs}
    if import_problem("decord") is None:
        decord = importlib.import_module("decord")

        def by_decord() -> Tensor:
            reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=THREADS)
            return resized(reader.get_batch(indices(len(reader))).asnumpy())

        found["decord2"] = by_decord
    return found


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """One row a size."""
    platform.install("cpu")
    torch.set_num_threads(1)
    rows = []
    for name in args.sizes:
        path = folder / f"{name}.mp4"
        make_video(path, SIZES[name], args.seconds)
        found = readers(path)
        frames = {reader: read() for reader, read in found.items()}
        # Each converts colours in its own way: within a few grey levels.
        apart = max(
            float((one.float() - frames["ours"].float()).abs().mean()) for one in frames.values()
        )
        seconds = seconds_in_turn(found, args.repeats, torch.device("cpu"))
        rates = {reader: len(frames[reader]) / value for reader, value in seconds.items()}
        rows.append({"size": name, "frames": len(frames["ours"]), "apart": apart, "rates": rates})
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and hands over; see the file's docstring."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_arguments(parser)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--seconds", type=int, default=10, help="of each video")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write-docs", action="store_true", help="docs/video.md too")
    args = parser.parse_args(given)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(args, Path(folder))

    def ratio(row: dict[str, Any], peer: str) -> float | None:
        return row["rates"]["ours"] / row["rates"][peer] if peer in row["rates"] else None

    def shown(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    header = ("video", "frames kept", "this project, frames/s")
    table = markdown_table(
        (*header, *(f"{peer}, frames/s" for peer in LEAST), *(f"of {peer}" for peer in LEAST)),
        (
            (
                row["size"],
                str(row["frames"]),
                f"{row['rates']['ours']:.1f}",
                *(shown(row["rates"].get(peer)) for peer in LEAST),
                *(shown(ratio(row, peer)) for peer in LEAST),
            )
            for row in rows
        ),
    )

    def draw(axes: Any) -> None:
        for peer in LEAST:
            points = [(row["size"], ratio(row, peer)) for row in rows if ratio(row, peer)]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", label=f"of {peer}")
        axes.axhline(1.0, color="grey", linewidth=0.8)
        axes.set(ylabel="frames a second of this project's reader, of the peer's")
        axes.legend()

    hand_over(NAME, args, table, rows, draw)
    if args.write_docs:
        command = shlex.join(["python", "-m", MODULE, *given])
        text = f"{table}\n`{command}`: {provenance('cpu')}.\n"
        write_section(ROOT / "docs" / "video.md", NAME, text)
    wrong = any(row["apart"] > 2 or row["frames"] != args.seconds for row in rows)
    slow = any(
        (found := ratio(row, peer)) is not None and found < least
        for row in rows
        for peer, least in LEAST.items()
    )
    return int(wrong or slow)


if __name__ == "__main__":
    sys.exit(main())
