"""Broken video files: refused with their true reason, and never read as a shorter video."""

from __future__ import annotations

import functools
import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dattn_mcore.data.media.video.probe import probe_video
from dattn_mcore.data.media.video.reader import read_frames
from dattn_mcore.data.media.video.settings import VideoLimits
from dattn_mcore.errors import DataError
from tests.unit.data.video_files import constant, read_code, video_bytes

av = pytest.importorskip("av")
LIMITS = VideoLimits(max_pixels=1_000_000, max_seconds=60)
KINDS: dict[str, dict[str, Any]] = {
    "mp4": {},
    "front": {"options": {"movflags": "faststart"}},
    "webm": {"container": "webm", "codec": "libvpx-vp9"},
    "avi": {"container": "avi"},
    "matroska": {"container": "matroska"},
}


@functools.cache
def whole(kind: str = "mp4") -> bytes:
    """A good file of 8 s."""
    return video_bytes(constant(80), **KINDS[kind])


def flipped(data: bytes, share: float, length: int) -> bytes:
    """Bytes inverted from a share of the file on."""
    start = int(len(data) * share)
    middle = bytes(255 - byte for byte in data[start : start + length])
    return data[:start] + middle + data[start + length :]


def without(data: bytes, box: bytes) -> bytes:
    """An MP4 file whose box has another name, so that no reader knows it."""
    assert box in data
    return data.replace(box, b"xxxx")


def sound_alone() -> bytes:
    """A file with a sound track only."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=16_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16_000), np.float32), "fltp", "mono")
        frame.sample_rate = 16_000
        for packet in [*stream.encode(frame), *stream.encode()]:
            output.mux(packet)
    return file.getvalue()


def still(kind: str) -> bytes:
    """An image."""
    file = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(file, kind)
    return file.getvalue()


def zipped() -> bytes:
    """An archive with a video in it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.mp4", whole())
    return file.getvalue()


READ = "cannot be read as a video"
BROKEN: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "is empty"),
    "one byte": (lambda: b"\0", READ),
    "zeros": (lambda: bytes(5000), READ),
    "text": (lambda: b"this is no video\n" * 200, READ),
    "HTML of a server": (lambda: b"<!DOCTYPE html><html><body>404</body></html>", READ),
    "JSON of a server": (lambda: b'{"error": "quota"}' * 20, READ),
    "pointer of a large-file store": (
        lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        READ,
    ),
    "archive": (zipped, READ),
    "random": (lambda: np.random.default_rng(0).bytes(20_000), READ),
    "sound alone": (sound_alone, r"holds no video \(audio\)"),
    "MP4 without an index": (lambda: without(whole(), b"moov"), READ),
    "MP4 cut before its index": (lambda: whole()[:-3000][: len(whole()) // 2], READ),
    "MP4 of its first bytes": (lambda: whole()[:40], READ),
    "MP4 cut behind its index": (lambda: whole("front")[: len(whole()) * 6 // 10], "v "),
    "MP4 cut in its last tenth": (lambda: whole("front")[: len(whole()) * 8 // 10], "v "),
    "MP4 without sample sizes": (lambda: without(whole(), b"stsz"), "v "),
    "MP4 without sample places": (lambda: without(whole(), b"stco"), "v "),
    "MP4 without a description": (lambda: without(whole(), b"stsd"), "v "),
    "MP4 without track headers": (lambda: without(whole(), b"trak"), r"holds no video|cannot"),
    "MP4 without frames": (lambda: without(whole(), b"mdat")[:200], "v "),
    "WebM cut in the middle": (lambda: whole("webm")[: len(whole("webm")) // 2], "v "),
    "WebM of its first bytes": (lambda: whole("webm")[:60], "v "),
    "WebM, flipped bytes": (lambda: flipped(whole("webm"), 0.5, 4000), "v "),
    "MP4, flipped bytes": (lambda: flipped(whole("front"), 0.6, 3000), "v "),
    "MP4, its header flipped": (lambda: flipped(whole("front"), 0.0, 600), READ),
    "AVI cut in the middle": (lambda: whole("avi")[: len(whole()) // 2], "v "),
    "Matroska cut in the middle": (lambda: whole("matroska")[: len(whole()) // 2], "v "),
    "frames too large": (
        lambda: video_bytes([0.0, 0.1], size=(1280, 800)),
        r"1280 x 800 pixels, more than data\.max_image_pixels = 1000000",
    ),
    "too long": (lambda: video_bytes([0.0, 100.0]), r"lasts 100 s, more than the 60 s allowed"),
}


def read(data: bytes | Path) -> list[int]:
    """Probes and reads a second each; numbers in the frames."""
    header = probe_video("v", data, LIMITS)
    times = [float(n) for n in range(int(header.duration + 0.05))] or [0.0]
    frames = read_frames("v", data, times, resize=lambda frame: frame, limits=LIMITS)
    return [read_code(frame.numpy()) for frame in frames]


def test_a_good_file_is_read() -> None:
    for kind in KINDS:
        assert read(whole(kind)) == [0, 10, 20, 30, 40, 50, 60, 70]


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_refused(kind: str) -> None:
    made, reason = BROKEN[kind]
    with pytest.raises(DataError, match=reason) as caught:
        read(made())
    message = str(caught.value)
    assert message.startswith("v ") and "\n" not in message and "BytesIO" not in message


def test_there_are_25_kinds_at_least() -> None:
    assert len(BROKEN) >= 25


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF"])
def test_an_image_is_one_frame_or_none(kind: str) -> None:
    """FFmpeg reads images as well: a file of a picture is a video of one frame, or refused."""
    try:
        assert len(read(still(kind))) == 1
    except DataError as error:
        assert str(error).startswith("v ")


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    for name in ("absent.mp4", ".", "pipe", "loop"):
        with pytest.raises(DataError, match="does not exist or is no regular file"):
            probe_video("v", tmp_path / name, LIMITS)


def test_a_wrong_name_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "video.jpg").write_bytes(whole())
    assert read(tmp_path / "video.jpg")[-1] == 70
