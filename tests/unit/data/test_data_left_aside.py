"""What a sample holds is used, known metadata, or makes the sample bad: nothing is dropped."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dattn_mcore.config.schema import Config, SourceConfig, SourceFormat
from dattn_mcore.data.__main__ import main
from dattn_mcore.data.index.store import Index, open_index
from dattn_mcore.data.tokenizer import SentencePieceTokenizer

IndexOf = Callable[..., Index]
ASK = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "7"}]
TALK = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "7"}]
PROPERTIES = {
    **{"caption": "a 7", "url": "u", "key": "00", "status": "success", "error_message": None},
    **{"width": 56, "height": 56, "original_width": 56, "original_height": 56, "exif": "{}"},
    "sha256": "00",
}


def png() -> bytes:
    """A picture."""
    out = io.BytesIO()
    Image.new("RGB", (56, 56)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def index_of(
    make_config: Callable[..., Config], toy_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> IndexOf:
    """The index of one file below `tmp_path`."""

    def make(name: str, form: SourceFormat = "auto", **data: Any) -> Index:
        (tmp_path / "1.png").write_bytes(png())
        path = str(tmp_path / name)
        source = SourceConfig(annotations=path, image_folder=str(tmp_path), format=form)
        where = {"sources": (source,), "index_dir": str(tmp_path / "index")}
        return open_index(make_config(**where, **data), toy_tokenizer)

    return make


def write_tar(path: Path, members: dict[str, bytes | None]) -> None:
    """Writes a shard; None stands for a hard link to the first member."""
    with tarfile.open(path, "w") as shard:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            if data is None:
                info.type, info.linkname = tarfile.LNKTYPE, next(iter(members))
            else:
                info.size = len(data)
            shard.addfile(info, io.BytesIO(data or b""))


def only_reason(index: Index) -> str:
    """Why the only sample is unusable."""
    assert len(index) == 1 and index.num_usable == 0
    (bad,) = index.bad()
    return str(bad["reason"])


TARS: dict[str, tuple[dict[str, bytes | None], str]] = {
    "one half of energon's": (
        {"000.png": png(), "000.context.txt": b"Which?"},
        "text '000.context.txt' does not belong to image '000.png'",
    ),
    "an image of another kind": ({"a.heic": b"?", "a.txt": b"a 7"}, "'a.heic'"),
    "a video": (
        {"a.png": png(), "a.mp4": b"?", "a.txt": b"a 7"},
        "member 'a.mp4' holds a video, which is",
    ),
    "a label": ({"a.png": png(), "a.cls": b"7", "a.txt": b"a 7"}, "member 'a.cls' is neither"),
    "dotted names": (
        {"i.v1.png": png(), "i.v1.txt": b"1", "i.v2.png": png(), "i.v2.txt": b"2"},
        "members 'i.v1.txt' and 'i.v2.txt' are both texts",
    ),
    "dotted names, one without a text": (
        {"i.v1.png": png(), "i.v1.txt": b"1", "i.v2.png": png()},
        "text 'i.v1.txt' does not belong to image 'i.v2.png'",
    ),
    "two captions": (
        {"a.png": png(), "a.txt": b"a 7", "a.caption": b"a 9"},
        "members 'a.txt' and 'a.caption' are both texts",
    ),
    "a caption in two cases": (
        {"a.png": png(), "a.txt": b"a 7", "a.TXT": b"a 9"},
        "members 'a.txt' and 'a.TXT' are both texts",
    ),
    "a caption alone": ({"a.txt": b"a 7"}, "caption 'a.txt' has no image"),
    "properties with a question": (
        {"a.png": png(), "a.txt": b"7", "a.json": b'{"url": "u", "question": "Which?"}'},
        "key 'question' of 'a.json' is neither",
    ),
    "an image that the record does not name": (
        {
            **{"a.0.png": png(), "a.1.png": png()},
            "a.json": json.dumps({"image": "a.0.png", "conversations": ASK}).encode(),
        },
        "image 'a.1.png' is not used by the record",
    ),
}


@pytest.mark.parametrize("name", list(TARS))
def test_a_tar_member_that_would_be_dropped(index_of: IndexOf, tmp_path: Path, name: str) -> None:
    members, reason = TARS[name]
    write_tar(tmp_path / "a.tar", members)
    assert reason in only_reason(index_of("a.tar", "webdataset"))


def test_a_link_in_a_tar_is_no_missing_image(index_of: IndexOf, tmp_path: Path) -> None:
    """GNU tar packs a file's second name as a link, which holds no bytes."""
    members = {"a.png": png(), "a.txt": b"a 7", "b.png": None, "b.txt": b"a 7"}
    write_tar(tmp_path / "a.tar", members)
    index = index_of("a.tar")
    (bad,) = index.bad()
    assert (bad["id"], index.num_usable) == ("b", 1)
    assert bad["reason"].startswith("member 'b.png' is a link")


def test_what_img2dataset_writes_is_known(index_of: IndexOf, tmp_path: Path) -> None:
    beside = json.dumps(PROPERTIES).encode()
    record = json.dumps({**PROPERTIES, "conversations": ASK}).encode()
    members = {
        **{"00.png": png(), "00.txt": b"a 7", "00.json": beside},
        **{"01.png": png(), "01.txt": b"a 7", "01.json": record},
        **{"02.a.png": png(), "02.a.txt": b"a 7"},
        **{"03.png": png(), "03.txt": b"a 7", "03.cls": b"1"},
    }
    write_tar(tmp_path / "a.tar", members)
    index = index_of("a.tar", metadata_keys=("cls",))
    assert index.num_usable == 4
    ignored = index.content["ignored"]
    assert (ignored[".json"], ignored[".txt"], ignored[".cls"]) == (1, 1, 1)
    assert ignored["sha256"] == 1 and "error_message" not in ignored  # null: nothing is there


RECORDS: dict[str, tuple[dict[str, Any], str]] = {
    "a clip": ({"clip": "a.mp4", "conversations": TALK}, "key 'clip' is neither used nor known"),
    "a turn's clip": (
        {"conversations": [TALK[0], {**TALK[1], "clip": 3}]},
        "turn 1: key 'clip' is neither",
    ),
    "a turn's image": (
        {"conversations": [{**TALK[0], "image": "1.png"}, TALK[1]]},
        "turn 0: key 'image' is neither",
    ),
}


@pytest.mark.parametrize("name", list(RECORDS))
def test_a_key_that_would_be_dropped(index_of: IndexOf, tmp_path: Path, name: str) -> None:
    record, reason = RECORDS[name]
    (tmp_path / "a.json").write_text(json.dumps([{"id": "a", **record}]))
    said = only_reason(index_of("a.json"))
    assert said.startswith(reason)
    assert said.endswith("name it in data.metadata_keys if training may leave it aside")


def test_a_key_that_stands_twice(index_of: IndexOf, tmp_path: Path) -> None:
    """JSON's readers keep the last."""
    text = json.dumps({"id": "a", "image": "1.png", "conversations": ASK})
    (tmp_path / "a.json").write_text(
        "[" + text.replace('"image"', '"image": "0.png", "image"') + "]"
    )
    assert only_reason(index_of("a.json", "llava")) == "key 'image' stands twice in one object"


def test_keys_that_hold_nothing_are_no_keys(index_of: IndexOf, tmp_path: Path) -> None:
    empty = {"video": None, "videos": [], "audio": "", "more": {}}
    (tmp_path / "a.json").write_text(json.dumps([{"id": "a", **empty, "conversations": TALK}]))
    index = index_of("a.json")
    assert index.num_usable == 1 and index.content["ignored"] == {}


def test_check_counts_what_is_left_aside(
    tmp_path: Path, toy_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    greeting = {"from": "gpt", "value": "Hello!"}
    records = [
        {"id": "a", "model": "x", "conversations": TALK},
        {"id": "b", "model": "x", "my_note": 3, "conversations": [greeting, *TALK]},
        {"id": "c", "model": "", "conversations": [{**TALK[0], "my_note": 1}, TALK[1]]},
    ]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(records))
    settings = [
        f"data.annotations={path}",
        f"data.image_folder={tmp_path}",
        "data.prepare=none",
        f"data.tokenizer={toy_model}",
        "data.template=mistral",
        "data.metadata_keys=[my_note]",
    ]
    assert main(["check", "--workers", "0", *settings]) == 0
    assert (
        "source  form   file  samples  unusable  left aside as metadata\n"
        "a       llava  json  3        0         'model' in 2 samples, a first turn from gpt in 1, "
        "'conversations[].my_note' in 1, 'my_note' in 1\n"
    ) in capsys.readouterr().out


def test_parquet_columns_that_would_be_dropped(index_of: IndexOf, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra 'parquet' is not installed")
    from pyarrow import parquet

    rows = [
        {"id": "a", "conversations": TALK, "video": None, "source": "x", "clips": []},
        {"id": "b", "conversations": TALK, "video": b"...", "source": "x", "clips": []},
        {"id": "c", "conversations": TALK, "video": b"", "source": None, "clips": ["a.mp4"]},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=2)
    index = index_of("a.parquet")
    reasons = {bad["id"]: bad["reason"] for bad in index.bad()}
    assert reasons == {
        "b": "key 'video' holds a video, which is not read yet; only text and images are",
        "c": "key 'clips' is neither used nor known metadata; name it in data.metadata_keys if "
        "training may leave it aside",
    }
    assert index.content["ignored"] == {"source": 1}
    both = [{"conversations": ASK, "image": png(), "images": [png()]}]
    parquet.write_table(pyarrow.Table.from_pylist(both), tmp_path / "b.parquet")
    assert "key 'images' is neither" in only_reason(index_of("b.parquet"))
