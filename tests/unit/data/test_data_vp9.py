"""Small VP9 files: what is written is what is read, and the same frames give the same file."""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from dattn_mcore.data.digits_drawing import load_digits
from dattn_mcore.data.vp9 import write_vp9
from dattn_mcore.errors import DataError


def _frames() -> np.ndarray:
    """Eight frames, uint8 [8, 56, 56]: one digit after another in the top left quarter."""
    ink = (load_digits()[0][:8] * 255).astype(np.uint8).repeat(3, axis=1).repeat(3, axis=2)
    frames = np.zeros((8, 56, 56), np.uint8)
    frames[:, :24, :24] = ink
    return frames


def test_the_decoded_frames_are_the_written_ones_and_the_file_is_the_same_again(tmp_path):
    av = pytest.importorskip("av", reason="PyAV (the extra video) is not installed")
    frames = _frames()
    write_vp9(tmp_path / "a.webm", frames)
    write_vp9(tmp_path / "b.webm", frames)
    with av.open(str(tmp_path / "a.webm")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.codec.canonical_name == "vp9"
        assert stream.average_rate == 8
        read = [(f.time, f.to_ndarray(format="gray")) for f in container.decode(stream)]
    assert [time for time, _ in read] == pytest.approx([n / 8 for n in range(8)], abs=1e-3)
    difference = np.stack([pixels for _, pixels in read]).astype(int) - frames
    # Lossy: 3 of 255 grey levels on average, where another digit's frame differs by 30 or more.
    assert np.abs(difference).mean(axis=(1, 2)).max() < 3
    assert (tmp_path / "a.webm").read_bytes() == (tmp_path / "b.webm").read_bytes()


def test_a_missing_pyav_is_one_line_with_the_extra(tmp_path, monkeypatch):
    def missing(name: str) -> None:
        raise ImportError(name)

    frames = _frames()
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(DataError, match=r"need PyAV, .* pip install 'dattn_mcore\[video\]'"):
        write_vp9(tmp_path / "a.webm", frames)
