"""Every message about a record names its file, line or row, form, and the field of an image."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dattn_mcore.config.schema import Config
from dattn_mcore.data.__main__ import main
from dattn_mcore.data.index.store import open_index
from dattn_mcore.data.pipeline import DataPipeline
from dattn_mcore.data.record_places import RecordPlaces, field_of
from dattn_mcore.data.sources.json_file import JsonFile
from dattn_mcore.data.sources.open_files import OpenFiles
from dattn_mcore.data.tokenizer import SentencePieceTokenizer
from tests.unit.data.shapes import tar_bytes

MakeConfig = Callable[..., Config]
ANSWER = {"from": "gpt", "value": "7"}


def asks(images: int) -> list[dict[str, str]]:
    return [{"from": "human", "value": "<image>" * images + "\nWhich?"}, ANSWER]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    Image.new("RGB", (56, 56)).save(tmp_path / "is.png")
    (tmp_path / "text.png").write_bytes(b"hello")
    return tmp_path


def reasons(config: Config, tokenizer: SentencePieceTokenizer) -> list[str]:
    """What the index says of each bad sample, after the file's name."""
    return [
        f"{entry['where'].partition(' ')[2]}: {entry['reason']}"
        for entry in open_index(config, tokenizer).bad()
    ]


def test_faults_of_images(
    make_config: MakeConfig, toy_tokenizer: SentencePieceTokenizer, images: Path
) -> None:
    records: list[dict[str, Any]] = [
        {"id": "a", "image": "gone.png", "conversations": asks(1)},
        {"id": "b", "image": "is.png", "conversations": asks(1)},
        {"id": "c", "images": ["is.png", "text.png"], "conversations": asks(2)},
        {"id": "d", "image": "https://x.org/1.png", "conversations": asks(1)},
        {"id": "e", "images": ["is.png", "is.png"], "conversations": asks(1)},
        {"id": "f", "image": f"{images}/gone.png", "conversations": asks(1)},
        {"id": "g", "image": "data:image/png;base64,AAAA", "conversations": asks(1)},
    ]
    (images / "a.jsonl").write_text("\n\n".join(map(json.dumps, records)))
    config = make_config(annotations=str(images / "a.jsonl"), image_folder=str(images))
    missing = f"image 'gone.png' does not exist below '{images}' (data.image_folder)"
    inside = "an image in 'image'"
    assert reasons(config, toy_tokenizer) == [
        f"line 1 (index 0, form llava), field image: {missing}",
        "line 5 (index 2, form llava), field images[1]: image 'text.png' is not an image (unknown "
        "signature 68 65 6c 6c)",
        "line 7 (index 3, form llava): 'image' is the URL 'https://x.org/1.png'; nothing is "
        "downloaded in training: download the images and give their paths",
        "line 9 (index 4, form llava): 1 <image> mark(s) in the conversation but 2 image(s) in "
        "'images'; there must be one mark for each image",
        f"line 11 (index 5, form llava), field image: {missing}",
        f"line 13 (index 6, form llava): image '{inside}' is not an image (unknown signature 00 "
        "00 00)",
    ]


def test_fields_of_nested_parts(
    make_config: MakeConfig, toy_tokenizer: SentencePieceTokenizer, images: Path
) -> None:
    parts = [
        {"type": "text", "text": "Which?"},
        {"type": "image", "image": "is.png"},
        {"type": "image", "image": "file://gone.png"},
    ]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "7"}]
    (images / "a.json").write_text(json.dumps([{"id": "a", "messages": turns}]))
    config = make_config(annotations=str(images / "a.json"), image_folder=str(images))
    (said,) = reasons(config, toy_tokenizer)
    where = "line 1 (index 0, form messages), field messages[0].content[2].image: "
    assert said.startswith(f"{where}image 'gone.png' does not exist")


def test_fields_of_tables_and_shards(
    make_config: MakeConfig, toy_tokenizer: SentencePieceTokenizer, images: Path
) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra 'parquet' is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    good = (images / "is.png").read_bytes()
    rows = [
        {"id": str(number), "conversations": asks(1), "images": [{"bytes": data, "path": None}]}
        for number, data in enumerate([good, good, b"no picture", good])
    ]
    path = images / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    (said,) = reasons(make_config(annotations=str(path), image_folder=str(images)), toy_tokenizer)
    assert said.startswith("row group 1 (index 2, form llava), field images: image '")
    assert said.endswith("is not an image (unknown signature 6e 6f 20 70)")
    record = json.dumps({"image": "x.png", "conversations": asks(1)}).encode()
    (images / "a.tar").write_bytes(tar_bytes({"x.json": record, "x.png": b"no picture"}))
    (said,) = reasons(make_config(annotations=str(images / "a.tar")), toy_tokenizer)
    assert said == (
        "byte 512 (index 0, form llava), field image: image 'x.png' is not an image (unknown "
        "signature 6e 6f 20 70)"
    )


def test_check_and_preview_name_the_place(
    images: Path, toy_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    logger = logging.getLogger("dattn_mcore")
    monkeypatch.setattr(logger, "handlers", [])
    whole = (images / "is.png").read_bytes()
    (images / "cut.png").write_bytes(whole[: len(whole) * 3 // 4])
    records = [{"id": name, "image": f"{name}.png", "conversations": asks(1)} for name in "ab"]
    records += [{"id": "c", "images": ["is.png", "cut.png"], "conversations": asks(2)}]
    (images / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    settings = [
        f"data.annotations={images / 'a.jsonl'}",
        f"data.image_folder={images}",
        f"data.tokenizer={toy_model}",
        "data.template=mistral",
        "data.prepare=none",
        "data.image_backend=pillow",
        "model.vision.image_size=56",
        "model.vision.patch_size=14",
    ]
    assert main(["check", "--workers", "0", "--decode", *settings]) == 1
    said = capsys.readouterr().out
    file = f"'{images / 'a.jsonl'}'"
    assert f"2 x image       first 'a': {file} line 1 (index 0, form llava), field image: " in said
    where = f"{file} line 3 (index 2, form llava), field images[1]: annotation 'c': image 'cut.png'"
    assert f"1 x decode      first 'c': {where} " in said
    page = images / "p.html"
    assert main(["preview", "--workers", "0", "--output", str(page), *settings]) == 0
    said = page.read_text().replace("&#x27;", "'").replace("&#39;", "'")
    assert f'class="bad">{where} ' in said


def test_training_names_the_place(
    make_config: MakeConfig, toy_tokenizer: SentencePieceTokenizer, images: Path
) -> None:
    """Two samples show the image that is lost after the index was made; both are named."""
    records = [
        {"id": "a", "image": "is.png", "conversations": asks(1)},
        {"id": "b", "image": ["is.png"], "conversations": asks(1)},
        {"id": "c", "conversations": asks(0)},
    ]
    path = images / "a.json"
    path.write_text("[\n" + ",\n".join(map(json.dumps, records)) + "\n]")
    config = make_config(annotations=str(path), image_folder=str(images), global_batch_size=3)
    open_index(config, toy_tokenizer)
    (images / "is.png").unlink()
    pipeline = DataPipeline(
        config, toy_tokenizer, dp_rank=0, dp_size=1, microbatch_multiple=1, needs_pixels=True
    )
    try:
        failures = pipeline.global_batch(0).failures
    finally:
        pipeline.close()
    said = sorted(failure.reason.partition(" does not")[0] for failure in failures)
    assert said == [
        f"'{path}' line 2 (index 0, form llava), field image: annotation 'a': image 'is.png'",
        f"'{path}' line 3 (index 1, form llava), field image[0]: annotation 'b': image 'is.png'",
    ]
    assert len({failure.kind for failure in failures}) == 1


def test_lines_are_those_of_the_file_in_any_order(tmp_path: Path) -> None:
    """Over several parts of a mebibyte, the second of which holds no end of a line."""
    lines = [b"{}" + b" " * (size % 7000) for size in range(0, 900_000, 991)]
    lines.insert(200, b"{}" + b" " * (3 << 20))
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    file = JsonFile(path, "")
    offsets = [place.offset for place in file.scan()]
    expected = [f"line {number}" for number in range(1, len(lines) + 1)]
    assert [file.line(offset) for offset in offsets] == expected
    assert [file.line(offset) for offset in offsets[::-1]] == expected[::-1]
    other = JsonFile(path, "")
    assert [other.line(offset) for offset in offsets[::-1]] == expected[::-1]
    file.close()
    other.close()


def test_what_cannot_be_read_is_named_by_its_number(
    make_config: MakeConfig, toy_tokenizer: SentencePieceTokenizer, images: Path
) -> None:
    path = images / "a.json"
    path.write_text(json.dumps([{"id": "a", "image": "is.png", "conversations": asks(1)}] * 9))
    config = make_config(annotations=str(path), image_folder=str(images))
    index = open_index(config, toy_tokenizer)
    sample, files = index.sample(7), OpenFiles(index.settings.files, 1)
    near = RecordPlaces(index.settings.files, files.get, most_counted=sample.place.offset)
    far = RecordPlaces(index.settings.files, files.get, most_counted=sample.place.offset - 1)
    asked = {"file": 0, "offset": sample.place.offset, "record": 7}
    assert near.where(**asked) == f"'{path}' line 1 (index 7, form llava)"
    assert far.where(**asked) == f"'{path}' byte {sample.place.offset} (index 7, form llava)"
    assert near.where(**asked, counted=False) == f"'{path}' (index 7, form llava)"
    files.close()
    path.unlink()
    assert near.where(**asked) == f"'{path}' (index 7, form llava)"
    assert near.field(0, sample.place, "is.png") == ""


def test_a_path_is_found_where_it_stands() -> None:
    record = {"id": "a/b.png", "meta": {"files": ["b.png", "a/b.png"]}}
    assert field_of({"images": ["c", "b.png"]}, "b.png") == "images[1]"
    assert field_of({"image": "/mnt/x/b.png"}, "x/b.png") == "image"
    assert field_of({"image": "xb.png"}, "b.png") == ""
    assert field_of(record, "a/b.png") == "meta.files[1]"
