"""What a video file says of itself, read without decoding a frame."""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dattn_mcore.data.media.video.settings import VideoLimits
from dattn_mcore.errors import ConfigError, DataError
from dattn_mcore.parallel.packages import import_problem

Source = bytes | Path
_SHOWN = 150  # characters of what the library says


@dataclass(frozen=True)
class VideoHeader:
    """A video's first real video stream.

    Attributes:
        width, height: of a frame as it is stored, before a rotation mark is applied.
        duration: seconds from the first frame to the end of the last.
        rate: average frames a second; 0: the file does not say.
        frames: number of frames; 0: the file does not say.
        codec: its name.
        keyframes: seconds of the frames that are stored whole; empty unless they were asked for.
    """

    width: int
    height: int
    duration: float
    rate: float
    frames: int
    codec: str
    keyframes: tuple[float, ...] = ()


def library() -> Any:
    """PyAV, imported late: an extra, with FFmpeg inside.

    Raises:
        ConfigError: it cannot be imported.
    """
    if problem := import_problem("av"):
        raise ConfigError(
            f"a sample shows a video, and PyAV {problem}; install the extra 'video' (pip install "
            "'.[video]')"
        )
    return importlib.import_module("av")


@contextmanager
def opened(who: str, source: Source) -> Iterator[tuple[Any, Any]]:
    """A file's container and its video stream.

    Args:
        who: how messages name it.
        source: all bytes of the file, or its path.

    Raises:
        DataError: it is no video file that can be read, or holds no video; also where the library
            fails while the caller reads.
    """
    av = library()
    try:
        file: Any = io.BytesIO(source) if isinstance(source, bytes) else str(source)
        if isinstance(source, Path) and not source.is_file():
            raise DataError(f"{who} does not exist or is no regular file")
        if (len(source) if isinstance(source, bytes) else source.stat().st_size) == 0:
            raise DataError(f"{who} is empty")
        with av.open(file, metadata_errors="replace") as container:
            yield container, _stream(who, container)
    except DataError:
        raise
    except (av.FFmpegError, OSError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())[:_SHOWN] or type(error).__name__
        raise DataError(f"{who} cannot be read as a video ({reason})") from None


def _stream(who: str, container: Any) -> Any:
    """The stream that a player shows: no cover picture of a piece of music."""
    av = library()
    pictures = av.stream.Disposition.attached_pic
    found = [stream for stream in container.streams.video if not stream.disposition & pictures]
    if not found:
        kinds = sorted({stream.type for stream in container.streams})
        raise DataError(f"{who} holds no video ({', '.join(kinds) or 'no stream at all'})")
    best = container.streams.best("video")
    stream = best if best in found else found[0]
    if stream.codec_context is None:
        raise DataError(f"{who} does not say how its video is coded, or FFmpeg does not know it")
    return stream


def probe_video(
    who: str, source: Source, limits: VideoLimits, *, with_keyframes: bool = False
) -> VideoHeader:
    """Reads what a file says of its video.

    Args:
        who: how messages name it.
        source: all bytes of the file, or its path.
        limits: what is refused.
        with_keyframes: reads all packets, to find the frames that are stored whole.

    Raises:
        DataError: it is no video, or beyond a limit; one line.
    """
    with opened(who, source) as (container, stream):
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > limits.max_pixels:
            raise DataError(
                f"{who} has frames of {width} x {height} pixels, more than data.max_image_pixels "
                f"= {limits.max_pixels}"
            )
        if not width or not height:
            raise DataError(f"{who} does not say how large its frames are; it may be cut short")
        duration = _said_duration(container, stream)
        keyframes: tuple[float, ...] = ()
        if with_keyframes or duration <= 0:
            duration, keyframes = _demuxed(container, stream, duration)
        if duration <= 0:
            raise DataError(f"{who} holds no frame")
        if duration > limits.max_seconds:
            raise DataError(
                f"{who} lasts {duration:.0f} s, more than the {limits.max_seconds:.0f} s allowed"
            )
        return VideoHeader(
            width=width,
            height=height,
            duration=duration,
            rate=float(stream.average_rate or 0),
            frames=stream.frames or 0,
            codec=stream.codec_context.name,
            keyframes=keyframes if with_keyframes else (),
        )


def _said_duration(container: Any, stream: Any) -> float:
    """Seconds; 0: the file does not say."""
    if stream.duration:
        return max(float(stream.duration * stream.time_base), 0.0)
    if len(container.streams) > 1:  # the longest stream's is said, which may be the sound
        return 0.0
    return max(said_end(container) - start_of(stream), 0.0)


def said_end(container: Any) -> float:
    """Seconds on the file's clock at which it says that it ends; 0: it does not say."""
    if not container.duration:
        return 0.0
    # Matroska says the time of the end; other containers how long it is from the start.
    from_zero = "matroska" in container.format.name
    start = 0 if from_zero else container.start_time or 0
    return float((container.duration + start) / library().time_base)


def start_of(stream: Any) -> float:
    """Seconds at which a stream begins on its file's clock."""
    return float((stream.start_time or 0) * stream.time_base)


def _demuxed(container: Any, stream: Any, said: float) -> tuple[float, tuple[float, ...]]:
    """Duration, and times of keyframes, by reading all packets."""
    start, end, whole = start_of(stream), said, []
    for packet in container.demux(stream):
        if packet.pts is None:
            continue
        time = float(packet.pts * packet.time_base) - start
        end = max(end, time + float((packet.duration or 0) * packet.time_base))
        if packet.is_keyframe and not packet.is_discard and time >= 0:
            whole.append(time)
    return end, tuple(sorted(whole))
