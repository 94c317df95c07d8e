"""What a run says of videos, without the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Policy = Literal["fps", "count", "vidi", "keyframes"]
Reduce = Literal["frames", "resolution"]


@dataclass(frozen=True)
class VideoLimits:
    """Files beyond these are bad samples.

    Attributes:
        max_pixels: of a frame, width times height.
        max_seconds: of a video.
    """

    max_pixels: int = 100_000_000
    max_seconds: float = 4 * 3600.0


@dataclass(frozen=True)
class VideoSampling:
    """Which frames are taken.

    Attributes:
        policy: `fps`: at 0, 1 / fps, 2 / fps ... seconds; `count`: as many as `count`, the first
            and the last frame among them; `vidi`: every n-th frame, n the average rate over `fps`,
            rounded; `keyframes`: those that the file holds whole.
        fps: frames a second, of `fps` and `vidi`.
        count: frames of `count`.
        max_frames: with more, as many as this are spread over the video; of `count` it is not read.
    """

    policy: Policy = "fps"
    fps: float = 1.0
    count: int = 16
    max_frames: int = 768
