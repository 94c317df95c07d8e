"""Parquet: how much of it is kept in memory, and how far an index of it says to be."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from dattn_mcore.config.schema import Config, SourceConfig
from dattn_mcore.data.index import build
from dattn_mcore.data.index.store import open_index
from dattn_mcore.data.sources import parquet as source
from dattn_mcore.data.sources.parquet import ParquetFile
from dattn_mcore.data.sources.row_groups import RowGroups
from dattn_mcore.data.tokenizer import SentencePieceTokenizer
from dattn_mcore.errors import DataError

pyarrow = pytest.importorskip("pyarrow", reason="the extra 'parquet' is not installed")
parquet = pytest.importorskip("pyarrow.parquet")
TURNS = [{"from": "human", "value": "<image>\nwhich?"}, {"from": "gpt", "value": "7"}]
GROUP = 4 * 10_000  # bytes of images


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two files of five groups of four rows with images of 10 000 bytes."""
    for name in "ab":
        rows = [
            {"id": f"{name}{row}", "conversations": TURNS, "image": bytes([row]) * 10_000}
            for row in range(20)
        ]
        table = pyarrow.Table.from_pylist(rows)
        parquet.write_table(table, tmp_path / f"{name}.parquet", row_group_size=4)
    return sorted(tmp_path.glob("*.parquet"))


def test_all_files_share_one_budget(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    images = RowGroups(3 * GROUP + 1000)
    monkeypatch.setattr(source, "_IMAGES", images)
    opened = [ParquetFile(path, "") for path in files]
    for file in opened:
        for row, place in enumerate(file.scan()):
            _, (found,) = file.read(place)
            assert file.image(place, found) == bytes([row]) * 10_000
            assert images.kept < 3 * GROUP + 1000
    assert images.kept > 2 * GROUP
    for file in opened:
        file.close()
    assert images.kept == 0


def test_a_group_larger_than_the_budget_is_read_once(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "_IMAGES", RowGroups(100))
    file = ParquetFile(files[0], "")
    read, groups = file._file.read_row_group, []
    counted = type("Counted", (), {"metadata": file._file.metadata, "close": file._file.close})()
    counted.read_row_group = lambda group, columns: (
        groups.append((group, columns[-1])) or read(group, columns=columns)
    )
    file._file = counted
    for place in file.scan():
        file.image(place, file.read(place)[1][0])
    file.close()
    assert groups == [(n, name) for n in range(5) for name in ("conversations", "image")]


def test_reading_in_order_keeps_one_group(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = RowGroups(1 << 20)
    monkeypatch.setattr(source, "_IMAGES", images)
    file = ParquetFile(files[0], "", in_order=True)
    for place in file.scan():
        file.read(place)
        assert images.kept < 2 * GROUP
    file.close()


def test_progress_of_one_file_rises(
    files: list[Path],
    make_config: Callable[..., Config],
    toy_tokenizer: SentencePieceTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(build, "PART", 5)
    monkeypatch.setattr(build, "_SECONDS_BETWEEN_LINES", 0.0)
    data = make_config(index_dir=str(tmp_path / "index")).data
    data = dataclasses.replace(data, sources=(SourceConfig(annotations=str(files[0])),))
    with caplog.at_level(logging.INFO):
        open_index(dataclasses.replace(make_config(), data=data), toy_tokenizer)
    shares = [line.split()[3] for line in caplog.messages if "%" in line]
    assert shares == ["20%", "45%", "70%", "95%"]


def test_no_time_is_promised_before_there_is_a_share(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "_SECONDS_BETWEEN_LINES", 0.0)
    progress = build._Progress()
    with caplog.at_level(logging.INFO):
        progress.made(10, 0.0)
        progress.made(10, 0.5)
        progress.made(10, 0.25)  # a part that ends late takes nothing back
    assert ["ETA" in line for line in caplog.messages] == [False, True, True]
    assert [line.split()[3] for line in caplog.messages] == ["0%", "50%", "50%"]


def test_a_corrupt_corpus(
    make_config: Callable[..., Config], toy_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    """Good rows are used, bad ones reported with their reason, and a cut file by its name."""
    out = io.BytesIO()
    Image.new("RGB", (56, 56)).save(out, "PNG")
    png = out.getvalue()
    text = json.dumps(TURNS)
    rows = {
        "good": (text, png, None),
        "json": (text[:-3], png, "column 'conversations' holds malformed JSON"),
        "null": (None, png, "'conversations' must be a non-empty list, got null"),
        "imageless": (text, None, "1 <image> mark(s) in the conversation but 0 image(s)"),
        "note": (text, b"no image", "is not an image"),
        "empty": (text, b"", "is an empty file"),
        "last": (text, png, None),
    }
    path = tmp_path / "a.parquet"
    named = [{"id": n, "conversations": t, "image": i} for n, (t, i, _) in rows.items()]
    parquet.write_table(pyarrow.Table.from_pylist(named), path, row_group_size=2)
    data = make_config(index_dir=str(tmp_path / "index")).data
    data = dataclasses.replace(data, sources=(SourceConfig(annotations=f"{tmp_path}/*.parquet"),))
    config = dataclasses.replace(make_config(), data=data)
    index = open_index(config, toy_tokenizer)
    reasons = {entry["id"]: entry["reason"] for entry in index.bad()}
    assert reasons.keys() == rows.keys() - {"good", "last"} and index.num_usable == 2
    for name, reason in reasons.items():
        assert str(rows[name][2]) in reason, name
    raw = path.read_bytes()
    for cut in (raw[: len(raw) // 2], b"", raw[:-4]):
        path.write_bytes(cut)
        with pytest.raises(DataError, match="a.parquet' is no whole parquet file"):
            open_index(config, toy_tokenizer)
