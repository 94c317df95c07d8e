"""How files are found, unpacked and told apart before a record is read."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from dattn_mcore.config.load import from_dict
from dattn_mcore.config.schema import Config, MappingConfig, SourceConfig, SourceFormat
from dattn_mcore.data.index.store import Index, open_index
from dattn_mcore.data.pipeline import DataPipeline
from dattn_mcore.data.sources import unpack
from dattn_mcore.data.sources.configured import CONTAINERS
from dattn_mcore.data.sources.records.forms import FORMS
from dattn_mcore.data.tokenizer import SentencePieceTokenizer
from dattn_mcore.errors import ConfigError, DataError
from tests.unit.data.shapes import URI, png, tar_bytes

TALK = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi!"}]
QA = [{"from": "human", "value": "<image>?"}, TALK[1]]
MESSAGES = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a"}]
IndexOf = Callable[..., Index]


@pytest.fixture
def index_of(
    make_config: Callable[..., Config], toy_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> IndexOf:
    """The index of one source below `tmp_path`."""

    def make(name: str, **source: Any) -> Index:
        one = SourceConfig(annotations=str(tmp_path / name), **source)
        return open_index(
            make_config(sources=(one,), index_dir=str(tmp_path / "index")), toy_tokenizer
        )

    return make


def lines(*records: Any) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def test_words_of_format_are_what_is_read() -> None:
    assert set(get_args(SourceFormat)) == {"auto", *CONTAINERS, *FORMS}


def test_a_compressed_file_is_unpacked_once(
    index_of: IndexOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines({"conversations": TALK}) * 3))
    index = index_of(path.name)
    found = [index.sample(number).id for number in range(3)]
    assert found == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]
    (copy,) = (tmp_path / "index" / "unpacked").glob("*/*/a.jsonl")
    assert copy.read_bytes() == gzip.decompress(path.read_bytes())
    monkeypatch.setattr(unpack, "_unpack", lambda *arguments: pytest.fail("unpacked again"))
    again = index_of(path.name)
    assert again.folder == index.folder
    monkeypatch.undo()
    path.write_bytes(gzip.compress(lines({"conversations": TALK}) * 4))
    assert len(index_of(path.name)) == 4  # it has changed


def test_more_than_one_member_is_one_stream(index_of: IndexOf, tmp_path: Path) -> None:
    raw = lines({"conversations": TALK})
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(raw) + gzip.compress(raw))
    assert len(index_of("a.jsonl.gz")) == 2
    pyarrow = pytest.importorskip("pyarrow", reason="the extra 'parquet' is not installed")
    frame = pyarrow.Codec("zstd").compress(raw, asbytes=True)
    (tmp_path / "b.jsonl.zst").write_bytes(frame + frame)
    assert len(index_of("b.jsonl.zst")) == 2


@pytest.mark.parametrize("kind", ["gz", "zst"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign"])
def test_a_damaged_stream_is_named(
    index_of: IndexOf, tmp_path: Path, kind: str, damage: str
) -> None:
    records = [{"id": f"{number * 7919}", "conversations": TALK} for number in range(500)]
    raw = b"".join(lines(record) for record in records)
    if kind == "zst":
        pyarrow = pytest.importorskip("pyarrow", reason="the extra 'parquet' is not installed")
        packed = pyarrow.Codec("zstd").compress(raw, asbytes=True)
    else:
        packed = gzip.compress(raw)
    if damage == "cut":
        packed = packed[: len(packed) // 2]
    elif damage == "flipped":
        # Headers of blocks; what is flipped inside one, only a checksum would show.
        packed = packed[:12] + b"\xff" * 9 + packed[21:]
    else:
        packed = raw
    path = tmp_path / f"a.jsonl.{kind}"
    path.write_bytes(packed)
    name = {"gz": "gzip", "zst": "zstd"}[kind]
    with pytest.raises(DataError) as raised:
        index_of(path.name)
    assert str(raised.value).startswith(f"'{path}' is no whole {name} file (")
    assert str(raised.value).endswith("); copy or make it again")


def test_zstd_without_its_package_names_the_extra(
    index_of: IndexOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(b"(\xb5/\xfd")
    monkeypatch.setattr(unpack, "import_problem", lambda name: "is not installed")
    with pytest.raises(ConfigError) as raised:
        index_of("a.jsonl.zst")
    assert str(raised.value) == (
        f"'{tmp_path / 'a.jsonl.zst'}' is compressed with zstd, and pyarrow is not installed; "
        "install the extra 'parquet'"
    )


WAY_OUT = "give a JSON, tar, parquet or Arrow file of samples (docs/data.md)"


def test_a_file_that_is_none_names_what_may_be_given(index_of: IndexOf, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.json").write_bytes(b"")
    (tmp_path / "spaces.json").write_bytes(b" \n")
    setting = "data.sources[0].annotations"
    reasons = {
        "gone.json": f"{setting}: file '{tmp_path}/gone.json' does not exist; {WAY_OUT}",
        "folder": f"{setting}: '{tmp_path}/folder' is not a regular file; {WAY_OUT}",
        "empty.json": (
            f"'{tmp_path}/empty.json' is empty; it must be a non-empty list of samples, or one "
            "object per line"
        ),
        "spaces.json": (
            f"data: '{tmp_path}/spaces.json' holds no records; name a file that holds samples"
        ),
    }
    for name, reason in reasons.items():
        with pytest.raises(DataError) as raised:
            index_of(name)
        assert str(raised.value) == reason


def test_an_archive_of_another_kind_is_refused(index_of: IndexOf, tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match="is compressed in a way that is not read; unpack it, or"):
        index_of("a.zip")


def test_paths_start_in_the_files_folder(
    index_of: IndexOf, tmp_path: Path, toy_tokenizer: SentencePieceTokenizer
) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(png())
        path = tmp_path / name / "x.json"
        path.write_bytes(lines({"image": "1.png", "conversations": QA}))
    index = index_of("*/x.json")
    assert index.num_usable == 2
    found = [index.sample(number).images[0].identity.file for number in range(2)]
    assert found == [str(tmp_path / "a" / "1.png"), str(tmp_path / "b" / "1.png")]


def test_absolute_paths_may_lie_in_the_folder(index_of: IndexOf, tmp_path: Path) -> None:
    (tmp_path / "i").mkdir()
    (tmp_path / "i" / "1.png").write_bytes(png())
    paths = [f"{tmp_path}/i/1.png", f"file://{tmp_path}/i/1.png", f"{tmp_path}/ii/1.png"]
    paths += [f"{tmp_path}/i/../x.png", "/etc/passwd"]
    records = [{"image": path, "conversations": QA} for path in paths]
    (tmp_path / "a.jsonl").write_bytes(lines(*records))
    index = index_of("a.jsonl", image_folder=str(tmp_path / "i"))
    assert list(index.usable) == [1, 1, 0, 0, 0]
    assert {index.name(row) for row in index.images} == {"1.png"}
    assert all("is absolute; it must be relative to the" in bad["reason"] for bad in index.bad())


MIXED = [{"conversations": TALK}] * 70


def test_a_source_that_mixes_forms_is_refused(index_of: IndexOf, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(*MIXED, {"messages": MESSAGES}))
    with pytest.raises(DataError) as raised:
        index_of("a.jsonl")
    assert str(raised.value) == (
        f"'{tmp_path / 'a.jsonl'}' line 71 is a record of messages, and the source is read as "
        "llava; make a source of each form"
    )
    (tmp_path / "a.jsonl").write_bytes(lines(*MIXED, {"conversations": []}, {"a": 1}))
    assert index_of("a.jsonl").num_usable == 70  # broken, and of no other form


def test_a_form_may_be_given(index_of: IndexOf, tmp_path: Path) -> None:
    both = {"messages": MESSAGES, "instruction": "x", "output": "y"}
    (tmp_path / "a.jsonl").write_bytes(lines(both))
    with pytest.raises(DataError) as raised:
        index_of("a.jsonl")
    assert str(raised.value) == (
        f"data.sources[0].annotations: '{tmp_path / 'a.jsonl'}' line 1 (index 0) could be a record "
        "of messages and of llama_factory (keys 'messages', 'instruction', 'output'); set format: "
        "or mapping: of the source in data.sources (docs/data.md)"
    )
    (bad,) = index_of("a.jsonl", format="llama_factory").bad()
    assert bad["reason"].startswith("key 'messages' is neither used nor known metadata")
    assert bad["where"].endswith("line 1 (index 0, form llama_factory)")
    given = SourceConfig(annotations="x", format="swift", mapping=MappingConfig(question="q"))
    with pytest.raises(DataError, match=r"data.sources\[0\]: mapping: and format: swift are both"):
        index_of("a.jsonl", format=given.format, mapping=given.mapping)


def test_a_mapping_comes_from_yaml() -> None:
    tree = {"annotations": "a", "mapping": {"question": "q", "answer": "a"}}
    (source,) = from_dict({"data": {"sources": [tree]}}).data.sources
    assert source.mapping == MappingConfig(question="q", answer="a")
    tree["mapping"] = {"anser": "a"}
    with pytest.raises(ConfigError, match=r"data.sources\[0\].mapping.anser"):
        from_dict({"data": {"sources": [tree]}})


def test_images_inside_records_are_trained_on(
    make_config: Callable[..., Config], toy_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    """Of JSON, parquet, an Arrow folder and a tar: the same pixels."""
    datasets = pytest.importorskip("datasets", reason="`datasets` is not installed")
    asked = [{"type": "image", "image": URI}, {"type": "text", "text": "?"}]
    (tmp_path / "a.jsonl").write_bytes(
        lines({"messages": [{"role": "user", "content": asked}, MESSAGES[1]]})
    )
    rows = [{"messages": MESSAGES, "images": [{"bytes": png(), "path": None}]}]
    made = datasets.Dataset.from_list(rows)
    made.save_to_disk(str(tmp_path / "saved"))
    made.to_parquet(str(tmp_path / "b.parquet"))
    text = json.dumps({"messages": MESSAGES}).encode()
    (tmp_path / "c.tar").write_bytes(tar_bytes({"1.png": png(), "1.json": text}))
    names = ("a.jsonl", "saved", "b.parquet", "c.tar")
    sources = tuple(SourceConfig(annotations=str(tmp_path / name)) for name in names)
    config = make_config(global_batch_size=4, sources=sources, index_dir=str(tmp_path / "index"))
    where = {"dp_rank": 0, "dp_size": 1, "microbatch_multiple": 1, "needs_pixels": True}
    pipeline = DataPipeline(config, toy_tokenizer, **where)
    batch = pipeline.global_batch(0)
    pipeline.close()
    assert not batch.failures
    tiles = [tile for pack in batch.microbatches if pack.tiles is not None for tile in pack.tiles]
    assert len(tiles) == 4 and all(tile.max() == 0 for tile in tiles)  # png() is black
    forms = [source.form for source in pipeline.index.settings.sources]
    assert forms == ["messages"] * 4
    images = [pipeline.index.sample(number).images[0].identity for number in range(4)]
    assert len(set(images)) == 4


def test_several_splits_need_a_name(index_of: IndexOf, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="`datasets` is not installed")
    one = datasets.Dataset.from_list([{"messages": MESSAGES}])
    datasets.DatasetDict(train=one, test=one).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(DataError, match="holds the splits test, train; name the folder of one"):
        index_of("both")
    assert index_of("both/train").num_usable == 1
    shutil.copy(next((tmp_path / "both/train").glob("*.arrow")), tmp_path / "cut.arrow")
    raw = (tmp_path / "cut.arrow").read_bytes()
    (tmp_path / "cut.arrow").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(DataError, match=r"cut.arrow' is no whole Arrow file|cannot be read"):
        index_of("cut.arrow")


@pytest.mark.parametrize("offset", [2**30, -5])
def test_offsets_of_an_arrow_file_stay_in_it(
    index_of: IndexOf, tmp_path: Path, offset: int
) -> None:
    """pyarrow reads where they lead: into other memory, or the process ends."""
    pyarrow = pytest.importorskip("pyarrow", reason="the extra 'parquet' is not installed")
    texts = [json.dumps([{**MESSAGES[0], "content": "?" * size}, MESSAGES[1]]) for size in range(8)]
    table = pyarrow.table({"messages": texts})
    path = tmp_path / "a.arrow"
    with pyarrow.ipc.new_stream(path, table.schema) as out:
        out.write_table(table)
    assert index_of("a.arrow").num_usable == 8
    raw = bytearray(path.read_bytes())
    offsets = table.column(0).chunk(0).buffers()[1].to_pybytes()
    place = raw.index(offsets[:36]) + 12
    raw[place : place + 4] = offset.to_bytes(4, "little", signed=True)
    path.write_bytes(raw)
    for form in ("auto", "messages"):
        with pytest.raises(DataError) as raised:
            index_of("a.arrow", format=form)
        said = f"'{path}': column 'messages' of record batch 0 is damaged ("
        assert str(raised.value).startswith(said)
        assert str(raised.value).endswith("); copy or make it again")


def test_the_check_says_what_each_source_is(
    make_config: Callable[..., Config], toy_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    from dattn_mcore.data.source_table import source_table

    (tmp_path / "a.jsonl").write_bytes(lines({"conversations": TALK, "source": "x"}, {"a": 1}))
    (tmp_path / "b.jsonl").write_bytes(lines({"messages": MESSAGES}))
    sources = tuple(
        SourceConfig(annotations=str(tmp_path / name)) for name in ("a.jsonl", "b.jsonl")
    )
    config = make_config(sources=sources, index_dir=str(tmp_path / "index"))
    assert source_table(open_index(config, toy_tokenizer)) == [
        "source  form      file  samples  unusable  left aside as metadata",
        "a       llava     json  2        1         'source' in 1 samples",
        "b       messages  json  1        0         nothing",
    ]
