"""Writes small videos as VP9, which needs no encoder under the GPL."""

from __future__ import annotations

import importlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from dattn_mcore.errors import DataError

# One thread and no time-dependent choice: the same frames give the same file of one library.
_OPTIONS = {"crf": "24", "b": "0", "deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0"}


def write_vp9(path: Path, frames: np.ndarray, frame_rate: int = 8) -> None:
    """Writes a WebM file.

    Args:
        path: file to write.
        frames: uint8 [frames, height, width], grey; even height and width.
        frame_rate: frames a second.

    Raises:
        DataError: PyAV is missing.
        OSError: the file cannot be written.
    """
    try:
        av: Any = importlib.import_module("av")  # an extra
    except ImportError:
        raise DataError(
            "videos need PyAV, which is not installed; run pip install 'dattn_mcore[video]'"
        ) from None
    # bitexact: no time and no random number in the file.
    with av.open(str(path), "w", format="webm", options={"fflags": "bitexact"}) as container:
        stream = container.add_stream("libvpx-vp9", rate=frame_rate, options=_OPTIONS)
        stream.height, stream.width = frames.shape[1:]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="gray")
            frame = frame.reformat(format="yuv420p")
            frame.pts, frame.time_base = number, Fraction(1, frame_rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
