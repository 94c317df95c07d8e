"""The benchmark of the video reader, small: all readers give the same frames."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import video_reading


@pytest.mark.usefixtures("capsys")
def test_readers_give_the_same_frames(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    video_reading.make_video(path, (160, 120), 3)
    found = {name: read() for name, read in video_reading.readers(path).items()}
    assert {"ours", "transformers"} <= set(found)
    for tiles in found.values():
        assert tiles.shape == (3, 3, video_reading.SIZE, video_reading.SIZE)
        assert (tiles.float() - found["ours"].float()).abs().mean() <= 2
    # Frames are a second apart, and differ by far more.
    assert (found["ours"][0].float() - found["ours"][1].float()).abs().mean() > 5
