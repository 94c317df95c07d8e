"""What is wrong with a file is said of the file that the user named, and of what it really is."""

from __future__ import annotations

import bz2
import fcntl
import gzip
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dattn_mcore.config.schema import Config, DataConfig, SourceConfig
from dattn_mcore.data.index.store import Index, open_index
from dattn_mcore.data.sources import unpack
from dattn_mcore.data.sources.configured import configured_sources
from dattn_mcore.data.sources.source import open_source_file
from dattn_mcore.data.sources.unpack import unpacked
from dattn_mcore.data.tokenizer import SentencePieceTokenizer
from dattn_mcore.errors import DataError
from tests.unit.data.shapes import png, tar_bytes

TALK = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi!"}]
LINE = json.dumps({"conversations": TALK}).encode() + b"\n"
SETTING = "data.sources[0].annotations"
IndexOf = Callable[..., Index]


@pytest.fixture
def index_of(
    make_config: Callable[..., Config], toy_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> IndexOf:
    """The index of one source below `tmp_path`."""

    def make(name: str, **source: Any) -> Index:
        one = SourceConfig(annotations=str(tmp_path / name), **source)
        index_dir = str(tmp_path / "index")
        return open_index(make_config(sources=(one,), index_dir=index_dir), toy_tokenizer)

    return make


def refusal(index_of: IndexOf, name: str, **source: Any) -> str:
    with pytest.raises(DataError) as raised:
        index_of(name, **source)
    return str(raised.value)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (LINE * 70 + b"[" + LINE, ""),
        (b"", "is empty; it must be a non-empty list of samples, or one object per line"),
        (b"[\n" + LINE + b"7,\n{]", "line 3: malformed JSON (',' or ']' expected after a record)"),
        (
            b'{"a":\n1}',
            "starts with a JSON object over several lines (keys 'a'); it must be a list of "
            "samples, or one object per line",
        ),
    ],
)
def test_a_fault_of_a_compressed_file_names_the_file(
    index_of: IndexOf, tmp_path: Path, raw: bytes, reason: str
) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(raw))
    if reason:
        assert refusal(index_of, path.name) == f"'{path}' {reason}"
    else:
        (bad,) = index_of(path.name).bad()
        assert bad["where"] == f"'{path}' line 71 (index 70, form llava)"


def test_a_fault_of_a_compressed_shard_names_the_shard(index_of: IndexOf, tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    packed = tar_bytes({"0.png": png(), "0.json": LINE})
    path.write_bytes(gzip.compress(packed[:540]))
    assert refusal(index_of, path.name).startswith(f"'{path}' is truncated inside its member")
    path.write_bytes(gzip.compress(b"x" * 2000))
    assert refusal(index_of, path.name).startswith(f"'{path}' is no whole tar file (")


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a", "b")
    return out.getvalue()


def table(kind: str) -> bytes:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra 'parquet' is not installed")
    rows, out = pyarrow.table({"conversations": [json.dumps(TALK)]}), io.BytesIO()
    if kind == "parquet":
        __import__("pyarrow.parquet").parquet.write_table(rows, out)
        return out.getvalue()
    make = pyarrow.ipc.new_file if kind == "file" else pyarrow.ipc.new_stream
    with make(out, rows.schema) as writer:
        writer.write_table(rows)
    return out.getvalue()


TAR = tar_bytes({"0.png": png(), "0.txt": b"a cat"})


@pytest.mark.parametrize(
    ("name", "made", "said"),
    [
        ("a.jsonl", lambda: gzip.compress(LINE), "is a gzip file; name it 'a.jsonl.gz'"),
        ("a.tar", lambda: gzip.compress(TAR), "is a gzip file; name it 'a.tar.gz'"),
        (
            "a.jsonl",
            lambda: TAR,
            "is a tar file; name it 'a.tar', or set format: tar of its source",
        ),
        (
            "a.jsonl.gz",
            lambda: gzip.compress(TAR),
            "holds a tar file; name it 'a.tar.gz', or set format: tar of its source",
        ),
        (
            "a.jsonl.gz",
            lambda: gzip.compress(gzip.compress(LINE)),
            "holds a gzip file; unpack it once",
        ),
        (
            "a.json",
            lambda: table("parquet"),
            "is a parquet file; name it 'a.parquet', or set format: parquet of its source",
        ),
        (
            "a.parquet",
            lambda: table("file"),
            "is an Arrow file; name it 'a.arrow', or set format: arrow of its source",
        ),
        (
            "a.jsonl",
            lambda: table("stream"),
            "is an Arrow file; name it 'a.arrow', or set format: arrow of its source",
        ),
        ("a.jsonl", zipped, "is a zip file; unpack it, or use gzip or zstd"),
        ("a.jsonl", lambda: bz2.compress(LINE), "is a bzip2 file; unpack it, or use gzip or zstd"),
    ],
)
def test_a_file_of_another_kind_is_called_by_it(
    index_of: IndexOf, tmp_path: Path, name: str, made: Callable[[], bytes], said: str
) -> None:
    (tmp_path / name).write_bytes(made())
    assert refusal(index_of, name) == f"'{tmp_path / name}' {said}"
    if "set format:" in said:
        kind = said.partition("set format: ")[2].partition(" ")[0]
        assert index_of(name, format=kind).num_usable == 1
    if "name it" in said:
        right = said.partition("name it '")[2].partition("'")[0]
        (tmp_path / name).rename(tmp_path / right)
        assert index_of(right).num_usable == 1


@pytest.mark.parametrize("name", ["BZh", "PAR1", "PK\x03\x04", "7z"])
def test_a_shard_is_one_whatever_its_first_member_is_called(
    index_of: IndexOf, tmp_path: Path, name: str
) -> None:
    packed = tar_bytes({f"{name}.png": png(), f"{name}.txt": b"a cat"})
    (tmp_path / "a.tar").write_bytes(packed)
    assert index_of("a.tar").num_usable == 1


def test_records_that_are_all_damaged_have_no_form(index_of: IndexOf, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"conversations": \n' * 64 + LINE)
    assert refusal(index_of, path.name) == (
        f"{SETTING}: the form of the records cannot be found, as none of the first 64 can be read: "
        f"'{path}' line 1 (index 0): malformed JSON (Expecting value at character 18); correct the "
        "file, or set format: of the source in data.sources"
    )
    index = index_of(path.name, format="llava")
    assert (index.num_usable, len(index)) == (1, 65)
    path.write_bytes(b"{\n" + LINE)
    assert index_of(path.name).num_usable == 1
    path.write_bytes(b'{\n{"ask": "a"}\n')
    said = (
        f"{SETTING}: '{path}' line 2 (index 1) has the keys 'ask', which is no form that is known"
    )
    assert refusal(index_of, path.name).startswith(said)


def test_a_shard_of_images_alone_has_no_form(index_of: IndexOf, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes({"0.png": png(), "1.png": png()}))
    said = refusal(index_of, "a.tar")
    assert f"none of the first 2 can be read: '{tmp_path / 'a.tar'}' byte 512 (index 0): it" in said


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_table_without_rows_says_so(index_of: IndexOf, tmp_path: Path, kind: str) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra 'parquet' is not installed")

    def write(name: str, rows: Any) -> None:
        if kind == "parquet":
            __import__("pyarrow.parquet").parquet.write_table(rows, tmp_path / name)
        else:
            with pyarrow.ipc.new_stream(str(tmp_path / name), rows.schema) as writer:
                writer.write_table(rows)

    write(f"0.{kind}", pyarrow.table({"x": pyarrow.array([], pyarrow.string())}))
    said = f"{SETTING}: '{tmp_path / f'0.{kind}'}' has no rows; name a file that holds samples"
    assert refusal(index_of, f"0.{kind}") == said
    write(f"1.{kind}", pyarrow.table({"conversations": [json.dumps(TALK)]}))
    index = index_of(f"*.{kind}")  # an empty shard of several
    assert (len(index), index.num_usable, index.settings.sources[0].form) == (1, 1, "llava")
    write(f"1.{kind}", pyarrow.table({"x": ["a"]}))
    assert "has no key that a form reads; set format: or mapping:" in refusal(index_of, f"1.{kind}")


def copies(folder: Path) -> list[Path]:
    return sorted(folder.glob("unpacked/*/*/*"))


def test_a_former_copy_goes_and_others_stay(tmp_path: Path) -> None:
    paths = [tmp_path / "a.jsonl.gz", tmp_path / "b" / "a.jsonl.gz"]
    paths[1].parent.mkdir()
    first = []
    for path in paths:
        path.write_bytes(gzip.compress(LINE))
        first.append(unpacked(path, str(tmp_path)))
    assert copies(tmp_path) == sorted(first)
    paths[0].write_bytes(gzip.compress(LINE * 2))
    second = unpacked(paths[0], str(tmp_path))
    assert second.read_bytes() == LINE * 2
    assert copies(tmp_path) == sorted([second, first[1]])
    assert unpacked(paths[0], str(tmp_path)) == second


READER = """
import sys
from pathlib import Path
from dattn_mcore.config.schema import DataConfig, SourceConfig
from dattn_mcore.data.sources.configured import configured_sources
from dattn_mcore.data.sources.source import open_source_file
path, folder = sys.argv[1:]
data = DataConfig(sources=(SourceConfig(annotations=path),), index_dir=folder)
file = open_source_file(configured_sources(data)[0], 0)
places = list(file.scan())
print(len(places), flush=True)
sys.stdin.readline()
for place in places:
    sample, images = file.read(place)
    print(sample.turns[-1], *(len(file.image(place, image)) for image in images), flush=True)
"""


def members(answer: bytes, count: int) -> bytes:
    """A shard of samples in parts, whose members are looked up anew for each sample."""
    found = {}
    for number in range(count):
        found |= {f"{number}.png": png(), f"{number}.context.txt": b"What?"}
        found |= {f"{number}.answers.txt": answer}
    return gzip.compress(tar_bytes(found))


@pytest.mark.parametrize("removed", [False, True])
def test_what_another_run_reads_stays(tmp_path: Path, removed: bool) -> None:
    """Its copy is kept; and were it removed, as where there are no locks, it reads on."""
    path, folder = tmp_path / "a.tar.gz", tmp_path / "index"
    path.write_bytes(members(b"old", 3))
    with subprocess.Popen(
        [sys.executable, "-c", READER, str(path), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as reader:
        assert reader.stdin is not None and reader.stdout is not None
        assert reader.stdout.readline() == "3\n"
        (former,) = copies(folder)
        path.write_bytes(members(b"new", 4))
        present = unpacked(path, str(folder))
        assert copies(folder) == sorted([former, present])
        if removed:
            former.unlink()
        reader.stdin.write("\n")
        reader.stdin.flush()
        assert reader.stdout.read() == f"old {len(png())}\n" * 3
    assert reader.returncode == 0
    path.write_bytes(members(b"newer", 4))  # nobody reads the former copies any more
    assert copies(folder) != [(last := unpacked(path, str(folder)))]
    assert copies(folder) == [last]


def test_nothing_goes_where_there_are_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(LINE))
    former = unpacked(path, str(tmp_path))

    def flock(handle: Any, how: int) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    path.write_bytes(gzip.compress(LINE * 2))
    assert copies(tmp_path) == [former]
    assert len(copies(tmp_path)) == 1 and unpacked(path, str(tmp_path)) != former
    assert former in copies(tmp_path)
    data = DataConfig(sources=(SourceConfig(annotations=str(path)),), index_dir=str(tmp_path))
    file = open_source_file(configured_sources(data)[0], 0)
    assert len(list(file.scan())) == 2
    file.close()


def test_a_file_that_changes_while_it_is_unpacked_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(LINE))
    write = unpack._write

    def and_change(source: Path, out_path: Path, kind: str, folder: str) -> None:
        write(source, out_path, kind, folder)
        os.utime(source, (1, 1))

    monkeypatch.setattr(unpack, "_write", and_change)
    with pytest.raises(DataError) as raised:
        unpacked(path, str(tmp_path))
    assert str(raised.value) == (
        f"'{path}' has changed while it was unpacked; start again when it is whole"
    )
    assert copies(tmp_path) == []
    monkeypatch.undo()
    assert unpacked(path, str(tmp_path)).read_bytes() == LINE
