"""Which times of a video are looked at: from its header alone."""

from __future__ import annotations

import math

from dattn_mcore.data.media.video.probe import VideoHeader
from dattn_mcore.data.media.video.settings import VideoSampling

_SLACK = 1e-9  # of a quotient that should be whole


def times_of(header: VideoHeader, sampling: VideoSampling) -> tuple[float, ...]:
    """Seconds from the first frame, rising, one at least.

    At each time the frame is taken that is shown then.

    Args:
        header: of the video; with its keyframes where the policy is `keyframes`.
        sampling: the policy.
    """
    policy, most = sampling.policy, sampling.max_frames
    if policy == "count":
        return _spread(header, sampling.count)
    if policy == "keyframes":
        found = header.keyframes or (0.0,)
        if len(found) <= most:
            return found
        return tuple(found[number] for number in _every(len(found), most))
    if policy == "fps":
        number = max(1, math.ceil(header.duration * sampling.fps - _SLACK))
        times = tuple(n / sampling.fps for n in range(min(number, most + 1)))
    else:
        rate = header.rate or sampling.fps
        stride = max(1, round(rate / sampling.fps))
        frames = header.frames or max(1, math.floor(header.duration * rate + _SLACK))
        times = tuple(n / rate for n in range(0, min(frames, stride * (most + 1)), stride))
    return times if len(times) <= most else _spread(header, most)


def _spread(header: VideoHeader, count: int) -> tuple[float, ...]:
    """So many times, from the first frame to the last."""
    frame = 1 / header.rate if header.rate else 0.0
    last = max(header.duration - frame, 0.0)
    if count == 1 or last == 0:
        return (0.0,)
    if header.rate:
        count = min(count, max(1, round(header.duration * header.rate)))
    return tuple(last * n / (count - 1) for n in range(count)) if count > 1 else (0.0,)


def _every(number: int, kept: int) -> list[int]:
    """So many of 0 .. number - 1, evenly, the first and the last among them."""
    if kept == 1:
        return [0]
    return [round(n * (number - 1) / (kept - 1)) for n in range(kept)]
