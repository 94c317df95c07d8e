"""Video files that tests make: each frame has its number in it, as a bar code."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

BITS = 8
TICK = Fraction(1, 1000)


def bar_code(number: int, width: int = 64, height: int = 48) -> np.ndarray:
    """uint8 [height, width, 3]: the bits of a number as black and white bars, over a grey foot."""
    image = np.full((height, width, 3), 128, np.uint8)
    for bit in range(BITS):
        left, right = bit * width // BITS, (bit + 1) * width // BITS
        image[: height * 3 // 4, left:right] = 255 * (number >> bit & 1)
    return image


def read_code(image: np.ndarray) -> int:
    """The number in an image [height, width, 3], or [3, height, width]."""
    if image.shape[0] == 3:
        image = image.transpose(1, 2, 0)
    height, width = image.shape[:2]
    row = image[height // 3].mean(-1)
    middles = [(2 * bit + 1) * width // (2 * BITS) for bit in range(BITS)]
    return sum(int(row[middle] > 127) << bit for bit, middle in enumerate(middles))


def video_bytes(
    times: Sequence[float],
    *,
    container: str = "mp4",
    codec: str = "mpeg4",
    rate: int = 10,
    size: tuple[int, int] = (64, 48),
    gop: int = 12,
    options: dict[str, str] | None = None,
    start: float = 0.0,
    audio_seconds: float = 0.0,
    extra_streams: int = 0,
) -> bytes:
    """A file whose frame number n is shown from `times[n]` on.

    Args:
        times: seconds, rising.
        container: mp4, webm, matroska, avi.
        codec: of the frames.
        rate: that the file names; where times are not multiples of it the file's clock is finer.
        size: width and height.
        gop: frames from one that is stored whole to the next.
        options: of the container's writer.
        start: seconds that are added to all times.
        audio_seconds: of a sound track beside it.
        extra_streams: further video streams behind it, whose frames are number 255.
    """
    folder = tempfile.TemporaryDirectory()  # an index is put to the front of a real file only
    path = Path(folder.name) / "video"
    with folder, av.open(str(path), "w", format=container, options=options or {}) as output:
        streams = [output.add_stream(codec, rate=rate) for _ in range(1 + extra_streams)]
        for stream in streams:
            stream.width, stream.height = size
            stream.pix_fmt, stream.bit_rate = "yuv420p", 2_000_000
            stream.codec_context.gop_size = gop
            stream.codec_context.time_base = TICK
            stream.codec_context.thread_count = 1
        sound: Any = output.add_stream("aac", rate=16_000) if audio_seconds else None
        for number, time in enumerate(times):
            for place, stream in enumerate(streams):
                image = bar_code(255 if place else number % 256, *size)
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts, frame.time_base = round((time + start) / TICK), TICK
                output.mux(stream.encode(frame))
        for stream in streams:
            output.mux(stream.encode())
        if sound is not None:
            silence = np.zeros((1, round(16_000 * audio_seconds)), np.float32)
            frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
            frame.sample_rate = 16_000
            for packet in [*sound.encode(frame), *sound.encode()]:
                output.mux(packet)
        output.close()
        return path.read_bytes()


def constant(frames: int, rate: int = 10) -> list[float]:
    """Times of a constant rate."""
    return [number / rate for number in range(frames)]


def turned_clockwise(mp4: bytes, degrees: int) -> bytes:
    """The same file with a rotation mark: its players turn it clockwise.

    Writes the matrix of the first track's header, ISO/IEC 14496-12, 8.3.2: x' = a x + c y,
    y' = b x + d y, y downwards.
    """
    a, b, c, d = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    values = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
    matrix = b"".join((value & 0xFFFFFFFF).to_bytes(4, "big") for value in values)
    place = mp4.index(b"tkhd") + 4 + 40  # version 0: 40 bytes of other fields
    return mp4[:place] + matrix + mp4[place + 36 :]
