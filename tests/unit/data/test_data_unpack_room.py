"""Unpacking leaves room on the disk: a small file can hold more than fits."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from dattn_mcore.data.sources import unpack
from dattn_mcore.errors import DataError

MB = 1_000_000


def packed(folder: Path, kind: str, size: int) -> Path:
    """A compressed file of zeros: about a thousandth of its size."""
    path = folder / f"a.jsonl.{kind}"
    if kind == "gz":
        path.write_bytes(gzip.compress(bytes(size)))
    else:
        pyarrow = pytest.importorskip("pyarrow", reason="the extra 'parquet' is not installed")
        path.write_bytes(pyarrow.Codec("zstd").compress(bytes(size), asbytes=True))
    return path


def left(folder: Path) -> list[str]:
    """Files that unpacking left, but its lock."""
    return [file.name for file in folder.rglob("*") if file.is_file() and file.name != "lock"]


def refusal(path: Path, folder: Path) -> str:
    with pytest.raises(DataError) as raised:
        unpack.unpacked(path, str(folder))
    return str(raised.value)


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_what_does_not_fit_is_refused_before_the_disk_is_full(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, folder = packed(tmp_path, kind, 30 * MB), tmp_path / "index"
    monkeypatch.setattr(unpack, "_free", lambda folder: 10 * MB)
    needed = 10 << 20  # the first whole part above 95 % of what is free
    assert refusal(path, folder) == (
        f"'{path}' takes {needed:,} bytes or more unpacked, and '{folder}' had 10,000,000 free, "
        "of which 5 % stay free; set data.index_dir to a folder with more room"
    )
    assert left(folder) == []
    monkeypatch.setattr(unpack, "_free", lambda folder: 32 * MB)
    assert unpack.unpacked(path, str(folder)).stat().st_size == 30 * MB


def test_a_file_that_is_larger_than_the_room_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, folder = packed(tmp_path, "gz", 30 * MB), tmp_path / "index"
    size = path.stat().st_size
    monkeypatch.setattr(unpack, "_free", lambda folder: size)
    monkeypatch.setattr(gzip, "GzipFile", lambda **_: pytest.fail("it was begun"))
    assert refusal(path, folder).startswith(f"'{path}' takes {size:,} bytes or more unpacked, and")
    assert left(folder) == []


def test_others_may_fill_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room is looked at while writing, too."""
    path, folder = packed(tmp_path, "gz", 30 * MB), tmp_path / "index"
    free = iter([100 * MB, 90 * MB, 80 * MB, 6 * MB])
    monkeypatch.setattr(unpack, "_free", lambda folder: next(free))
    said = f"'{path}' takes {3 << 20:,} bytes or more unpacked, and '{folder}' had 100,000,000 free"
    assert refusal(path, folder).startswith(said)
    assert left(folder) == []


def test_the_room_is_the_disks(tmp_path: Path) -> None:
    assert 0 < unpack._free(tmp_path) < 1 << 60
