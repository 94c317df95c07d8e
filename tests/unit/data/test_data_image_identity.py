"""Which image an image is: the same for all samples that show it, another for all others."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from dattn_mcore.config.schema import Config, SourceConfig
from dattn_mcore.data.image_sets import image_sets
from dattn_mcore.data.index.store import Index, open_index
from dattn_mcore.data.tokenizer import SentencePieceTokenizer
from tests.unit.data.test_data_shards import image, record, write_tar

MakeConfig = Callable[..., Config]
TURNS = [{"from": "human", "value": "<image>\nwhich?"}, {"from": "gpt", "value": "7"}]


def indexed(
    make_config: MakeConfig,
    tokenizer: SentencePieceTokenizer,
    tmp_path: Path,
    *sources: SourceConfig,
) -> Index:
    config = make_config()
    data = dataclasses.replace(config.data, sources=sources, index_dir=str(tmp_path / "index"))
    return open_index(dataclasses.replace(config, data=data), tokenizer)


def test_files_in_folders(
    make_config: MakeConfig, toy_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    for name in ("x/a.png", "x/b.png", "y/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / "x")
    shown = [("one", ["a.png", ".//a.png", "b.png"]), ("two", ["a.png"]), ("three", ["x/a.png"])]
    for name, paths in shown:
        records = [{"id": path, "image": path, "conversations": TURNS} for path in paths]
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    folders = {"one": "x", "two": "link", "three": "."}
    sources = [
        SourceConfig(str(tmp_path / f"{name}.json"), str(tmp_path / folder))
        for name, folder in folders.items()
    ]
    sources.append(SourceConfig(str(tmp_path / "two.json"), str(tmp_path / "y")))
    index = indexed(make_config, toy_tokenizer, tmp_path, *sources)
    found = [index.sample(number).images[0].identity for number in range(6)]
    a, b, other = (str((tmp_path / name).resolve()) for name in ("x/a.png", "x/b.png", "y/a.png"))
    assert [each.file for each in found] == [a, a, b, a, a, other]
    assert all(each.place == () for each in found)
    assert index.images["identity"].tolist() == [each.digest for each in found]
    assert len(set(index.images["identity"].tolist())) == 3


def test_members_of_shards(
    make_config: MakeConfig, toy_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    for name in "ab":
        members = {
            f"{n}.{kind}": data
            for n in "xy"
            for kind, data in (("png", image(7)), ("json", record(n)))
        }
        write_tar(tmp_path / f"{name}.tar", members)
    index = indexed(
        make_config,
        toy_tokenizer,
        tmp_path,
        SourceConfig(str(tmp_path / "*.tar")),
        SourceConfig(str(tmp_path / "a.tar")),
    )
    found = [index.sample(number).images[0] for number in range(6)]
    assert [each.identity.file[-5:] for each in found] == [f"{n}.tar" for n in "aabbaa"]
    assert all(each.identity.place == (each.place.offset, each.place.length) for each in found)
    assert found[0].identity == found[4].identity != found[2].identity
    assert len({each.identity for each in found}) == 4


def test_rows_of_parquet(
    make_config: MakeConfig, toy_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra 'parquet' is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    out = io.BytesIO()
    Image.new("RGB", (56, 56)).save(out, "PNG")
    two = [{"from": "human", "value": "<image> <image>"}, {"from": "gpt", "value": "7"}]
    rows = [{"id": str(n), "conversations": two, "images": [out.getvalue()] * 2} for n in range(3)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet", row_group_size=2)
    source = SourceConfig(str(tmp_path / "p.parquet"))
    index = indexed(make_config, toy_tokenizer, tmp_path, source)
    found = [image.identity for number in range(3) for image in index.sample(number).images]
    assert [each.place for each in found] == [
        *((group, row, number) for group, row in ((0, 0), (0, 1), (1, 0)) for number in (1, 2))
    ]
    assert {each.file for each in found} == {str((tmp_path / "p.parquet").resolve())}


def test_by_bytes(
    make_config: MakeConfig, toy_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    """Copies in two folders, and in a shard for each sample, are one image; others are not."""
    first, second = image(1), image(2)
    for folder, data in (("x", first), ("y", first), ("z", second)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(data)
        (tmp_path / f"{folder}.json").write_text(
            json.dumps([{"id": folder, "image": "a.png", "conversations": TURNS}])
        )
    members = {}
    for number, data in enumerate((first, second, first)):
        members |= {f"{number}.json": record(str(number)), f"{number}.png": data}
    write_tar(tmp_path / "all.tar", members)
    sources = [SourceConfig(str(tmp_path / f"{f}.json"), str(tmp_path / f)) for f in "xyz"]
    sources.append(SourceConfig(str(tmp_path / "all.tar")))
    config = make_config()
    data = dataclasses.replace(config.data, sources=sources, index_dir=str(tmp_path / "index"))
    kinds = {}
    for hashes in (False, True):
        chosen = dataclasses.replace(config, data=dataclasses.replace(data, hash_images=hashes))
        index = open_index(chosen, toy_tokenizer)
        found = [index.sample(number).images[0].identity for number in range(6)]
        assert index.images["identity"].tolist() == [each.digest for each in found]
        kinds[hashes] = [found.index(each) for each in found]
        assert [image_sets(index).tolist().index(s) for s in image_sets(index)] == kinds[hashes]
    assert kinds == {False: [0, 1, 2, 3, 4, 5], True: [0, 0, 2, 0, 2, 0]}
    expected = hashlib.sha256(first).digest()[:16]
    assert b"".join(part.to_bytes(8, "little") for part in found[0].content) == expected
