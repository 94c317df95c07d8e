"""Frames that are read from videos: exactly those that are shown at the times asked for."""

from __future__ import annotations

import io

import numpy as np
import psutil
import pytest
import torch

from dattn_mcore.data.media.video.probe import probe_video
from dattn_mcore.data.media.video.reader import read_frames
from dattn_mcore.data.media.video.settings import VideoLimits
from dattn_mcore.data.resize import to_tile
from tests.unit.data.video_files import constant, read_code, turned_clockwise, video_bytes

av = pytest.importorskip("av")
LIMITS = VideoLimits()
VARIABLE = [0.0, 0.04, 0.5, 0.52, 0.9, 1.7, 1.71, 3.0, 3.5, 4.25]


def numbers_at(data: bytes, times: list[float], **named: object) -> list[int]:
    """Numbers in the frames that are read."""
    frames = read_frames("v", data, times, resize=lambda frame: frame, limits=LIMITS, **named)
    return [read_code(frame.numpy()) for frame in frames]


def shown_at(starts: list[float], times: list[float]) -> list[int]:
    """Number of the last frame that starts not later than each time."""
    return [max([n for n, start in enumerate(starts) if start <= time + 5e-4]) for time in times]


FILES = {
    "mp4": dict(),
    "webm, vp9": dict(container="webm", codec="libvpx-vp9"),
    "matroska": dict(container="matroska"),
    "avi": dict(container="avi"),
    "start not at 0": dict(start=7.3),
    "matroska, start not at 0": dict(container="matroska", start=7.3),
    "odd size": dict(container="webm", codec="libvpx-vp9", size=(71, 53)),
    "with sound": dict(audio_seconds=2.0),
    "sound longer than the pictures": dict(container="matroska", audio_seconds=6.0),
    "two video streams": dict(extra_streams=1),
    "all frames whole": dict(gop=1),
    "one whole frame": dict(gop=1000),
    "index at the front": dict(options={"movflags": "faststart"}),
    "in fragments": dict(options={"movflags": "frag_keyframe+empty_moov"}),
}


@pytest.mark.parametrize("kind", FILES)
def test_the_frame_shown_at_a_time_is_taken(kind: str) -> None:
    starts = constant(30)
    data = video_bytes(starts, **FILES[kind])
    header = probe_video("v", data, LIMITS)
    assert header.duration == pytest.approx(3.0, abs=0.11)
    assert (header.width, header.height) == FILES[kind].get("size", (64, 48))
    times = [0.0, 0.05, 0.1, 0.199, 0.3, 1.0, 1.55, 2.8, 2.9, 2.99]
    assert numbers_at(data, times) == shown_at(starts, times)
    assert numbers_at(data, starts) == list(range(30))
    assert numbers_at(data, [0.0, 2.5], threads=2) == [0, 25]


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_a_variable_rate_is_no_average(container: str) -> None:
    data = video_bytes(VARIABLE, container=container)
    times = [0.0, 0.03, 0.04, 0.49, 0.51, 0.52, 0.89, 1.69, 1.705, 1.71, 2.99, 3.4, 4.2, 4.25, 9.0]
    assert numbers_at(data, times) == shown_at(VARIABLE, times)


def test_frames_that_an_edit_list_hides_are_not_there() -> None:
    """A cut without encoding: the file starts at a whole frame, its list at a later one."""
    whole = video_bytes(constant(40), gop=10)
    hidden = 0.7  # of the 10th to the 17th frame
    cut = io.BytesIO()
    with av.open(io.BytesIO(whole)) as source, av.open(cut, "w", format="mp4") as output:
        given = source.streams.video[0]
        stream = output.add_stream_from_template(given)
        for packet in source.demux(given):
            if packet.dts is None or packet.pts * packet.time_base < 1:
                continue
            ticks = round((1 + hidden) / packet.time_base)
            packet.pts, packet.dts = packet.pts - ticks, packet.dts - ticks
            packet.stream = stream
            output.mux(packet)
    data = cut.getvalue()
    assert b"elst" in data
    assert numbers_at(data, [0.0, 0.1, 1.0, 2.2]) == [17, 18, 27, 39]


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_rotation_mark_is_applied(degrees: int) -> None:
    """As `numpy.rot90` turns, and as images are turned by their orientation."""
    plain = video_bytes(constant(5))
    upright, turned = (
        read_frames("v", data, [0.2], resize=lambda frame: frame, limits=LIMITS)[0].numpy()
        for data in (plain, turned_clockwise(plain, degrees))
    )
    clockwise = np.rot90(upright.transpose(1, 2, 0), -degrees // 90).transpose(2, 0, 1)
    assert np.array_equal(turned, clockwise)


def test_one_frame_is_a_video() -> None:
    data = video_bytes([0.0])
    assert probe_video("v", data, LIMITS).duration > 0
    assert numbers_at(data, [0.0, 0.0, 3.0]) == [0, 0, 0]


def test_pixels_are_those_of_the_decoder_through_the_path_of_images() -> None:
    data = video_bytes(constant(20), container="webm", codec="libvpx-vp9", size=(160, 90))
    with av.open(io.BytesIO(data)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    found = read_frames(
        "v",
        data,
        [0.3, 1.2],
        resize=lambda frame: to_tile(frame, 56, "pad", (127, 127, 127)),
        limits=LIMITS,
    )
    for tile, number in zip(found, (3, 12), strict=True):
        pixels = torch.from_numpy(frames[number]).permute(2, 0, 1)
        assert torch.equal(tile, to_tile(pixels, 56, "pad", (127, 127, 127)))


def test_keyframes_are_found_without_decoding() -> None:
    header = probe_video("v", video_bytes(constant(30), gop=10), LIMITS, with_keyframes=True)
    assert header.keyframes == pytest.approx((0.0, 1.0, 2.0))
    assert header.rate == pytest.approx(10)


def test_a_path_is_read_as_its_bytes_are(tmp_path) -> None:
    data = video_bytes(constant(10))
    (tmp_path / "a.mp4").write_bytes(data)
    assert probe_video("v", tmp_path / "a.mp4", LIMITS) == probe_video("v", data, LIMITS)
    frames = (
        read_frames("v", source, [0.4], resize=lambda frame: frame, limits=LIMITS)
        for source in (data, tmp_path / "a.mp4")
    )
    assert torch.equal(*frames)


def test_an_hour_is_read_in_bounded_memory() -> None:
    """All frames together would be 300 MB."""
    process, peak = psutil.Process(), [0]
    data = video_bytes(constant(3600, rate=1), rate=1, size=(192, 144), gop=300)
    times = [float(n) for n in range(0, 3600, 10)]
    assert probe_video("v", data, LIMITS).duration == pytest.approx(3600, abs=1.1)
    before = process.memory_info().rss

    def resize(frame: torch.Tensor) -> torch.Tensor:
        peak[0] = max(peak[0], process.memory_info().rss)
        return frame[:, ::4, ::4].clone()

    frames = read_frames("v", data, times, resize=resize, limits=LIMITS)
    assert [read_code(frame.numpy()) for frame in frames] == [n % 256 for n in range(0, 3600, 10)]
    assert peak[0] - before < 40 * 2**20
