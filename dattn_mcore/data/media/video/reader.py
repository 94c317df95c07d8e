"""The frames of a video at some times, decoded in one pass.

A decode error, or a file that ends before it says it does, is an error: never a shorter video.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dattn_mcore.data.media.video.probe import Source, opened, said_end, start_of
from dattn_mcore.data.media.video.settings import VideoLimits
from dattn_mcore.errors import DataError

_CUT = 1.0  # seconds by which the packets of a whole file may end before it says it does


def read_frames(
    who: str,
    source: Source,
    times: Sequence[float],
    *,
    resize: Callable[[Tensor], Tensor],
    limits: VideoLimits,
    threads: int = 1,
) -> Tensor:
    """Frames of a video, each resized as soon as it is decoded.

    The frame at t is the last that is shown not later than t, on the clock that starts with the
    first frame; t of half a tick before a frame is that frame's. A frame is turned by its rotation
    mark, in quarters; pixels that are not square are taken for square.

    Args:
        who: how messages name it.
        source: all bytes of the file, or its path.
        times: seconds, rising.
        resize: from an upright frame, uint8 [3, height, width] RGB, to uint8 [3, size, size].
        limits: what is refused.
        threads: of the decoder.

    Returns:
        uint8 [times, 3, size, size].

    Raises:
        DataError: it cannot be decoded, or ends too early; one line.
    """
    kept: list[Tensor] = []
    with opened(who, source) as (container, stream):
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = threads
        slack = float(stream.time_base) / 2
        shown: Any = None  # the last frame before those that are decoded next
        made: Tensor | None = None  # what became of it
        for time, frame in _frames(who, container, stream):
            while shown is not None and len(kept) < len(times):
                if times[len(kept)] + slack >= time:
                    break
                made = _image(who, shown, resize, limits) if made is None else made
                kept.append(made)
            if len(kept) == len(times):
                break
            shown, made = frame, None
        if shown is None:
            raise DataError(f"{who} holds no frame that can be decoded")
        if len(kept) < len(times):
            made = _image(who, shown, resize, limits) if made is None else made
            kept += [made] * (len(times) - len(kept))
    return torch.stack(kept)


def _frames(who: str, container: Any, stream: Any) -> Iterator[tuple[float, Any]]:
    """Frames in the order in which they are shown, with their seconds from the first.

    Raises:
        DataError: one is broken, or the file ends too early.
    """
    start, end, number = start_of(stream), 0.0, 0
    for packet in container.demux():
        if packet.is_corrupt:
            raise DataError(f"{who} is damaged {end:.1f} s behind its start")
        if packet.pts is not None:
            length = (packet.duration or 0) + packet.pts
            end = max(end, float(length * packet.time_base))
        if packet.stream is not stream:
            continue
        for frame in packet.decode():
            time = number if frame.time is None else frame.time - start
            if frame.is_corrupt:
                raise DataError(f"{who} is damaged {time:.1f} s behind its first frame")
            number += 1
            if time >= -float(stream.time_base):
                yield time, frame
    said = said_end(container)
    if said - end > _CUT:
        raise DataError(f"{who} ends after {end:.1f} s, but says that it lasts {said:.1f} s")


def _image(who: str, frame: Any, resize: Callable[[Tensor], Tensor], limits: VideoLimits) -> Tensor:
    """One frame, upright and resized."""
    if frame.width * frame.height > limits.max_pixels:
        raise DataError(f"{who} has a frame of {frame.width} x {frame.height} pixels")
    pixels = frame.to_ndarray(format="rgb24")
    quarters = round(frame.rotation / 90) % 4  # counter-clockwise
    upright = np.ascontiguousarray(np.rot90(pixels, quarters).transpose(2, 0, 1))
    return resize(torch.from_numpy(upright))
