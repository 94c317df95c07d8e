"""Video and sound are not read yet: a record that shows either is refused with that reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dattn_mcore.config.schema import Config, MappingConfig, SourceConfig
from dattn_mcore.data.index.store import Index, open_index
from dattn_mcore.data.sources.metadata import known_metadata
from dattn_mcore.data.sources.records.forms import FORMS, parse_record
from dattn_mcore.data.sources.records.mapping import mapped_form
from dattn_mcore.data.tokenizer import SentencePieceTokenizer
from dattn_mcore.errors import DataError
from tests.unit.data.shapes import png, tar_bytes

MAPPED = MappingConfig(question="q", answer="a")
CALLED = {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}


def record_of(form: str, text: str) -> dict[str, Any]:
    """A whole record of a form, with a text where it can show media."""
    human, gpt = {"from": "human", "value": text}, {"from": "gpt", "value": "b"}
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "b"}]
    seen = {"from": "observation", "value": "c"}
    records: dict[str, dict[str, Any]] = {
        "llava": {"conversations": [human, gpt]},
        "sharegpt": {"conversations": [human, CALLED, seen, gpt]},
        "messages": {"messages": turns},
        "swift": {"query": text, "response": "b"},
        "llama_factory": {"instruction": "a", "input": text, "output": "b"},
        "cauldron": {"texts": [{"user": text, "assistant": "b"}]},
        "interleaved": {"texts": ["a", text], "images": [None, None]},
        "pixmo": {"image": "1", "question": text, "answer": "b"},
        "energon": {"context": text, "answers": "b"},
        "webdataset": {"conversations": [human, gpt]},
        "mapping": {"q": text, "a": "b"},
    }
    return records[form]


def read(form: str, record: dict[str, Any], keys: tuple[str, ...] = ()) -> None:
    found = mapped_form(MAPPED) if form == "mapping" else FORMS[form]
    parse_record(record, "a", known_metadata(keys) | found.metadata, found)


def reason(form: str, record: dict[str, Any], keys: tuple[str, ...] = ()) -> str:
    with pytest.raises(DataError) as raised:
        read(form, record, keys)
    return str(raised.value)


@pytest.mark.parametrize("form", [*FORMS, "mapping"])
def test_a_mark_is_refused_in_every_form(form: str) -> None:
    read(form, record_of(form, "A clip."))
    for mark, medium in (("<video>", "video"), ("<audio>", "sound")):
        said = reason(form, record_of(form, f"{mark}\nWhat?"))
        line = f"a text holds the mark {mark}, and {medium} is not read yet; only text and "
        assert said == line + "images are"


@pytest.mark.parametrize("form", [*FORMS, "mapping"])
@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("video", "a video, which is"),
        ("videos", "videos, which are"),
        ("audio", "a sound, which is"),
        ("audios", "sounds, which are"),
    ],
)
def test_a_key_says_so_in_every_form(form: str, key: str, what: str) -> None:
    record = {**record_of(form, "What?"), key: ["1"]}
    assert (
        reason(form, record) == f"key '{key}' holds {what} not read yet; only text and images are"
    )


def test_metadata_keys_lead_to_no_mark_in_training() -> None:
    """A user may leave a video aside, and not its mark."""
    record = {"video": "1.mp4", **record_of("llava", "<video>\nWhat?")}
    assert reason("llava", record, ("video",)).startswith("a text holds the mark <video>")
    read("llava", {"video": "1.mp4", **record_of("llava", "What?")}, ("video",))


def test_marks_are_found_wherever_texts_stand() -> None:
    human, gpt = record_of("sharegpt", "a")["conversations"][0::3]
    seen = {"from": "observation", "value": "<audio>"}
    for form, record in (
        ("llava", {"system": "<audio>", "conversations": [human, gpt]}),
        ("llava", {"conversations": [human, {**gpt, "value": "<audio> b"}]}),
        ("sharegpt", {"conversations": [human, CALLED, seen, gpt]}),
        ("interleaved", {"text_list": ["<audio>"], "image_info": []}),
    ):
        assert reason(form, record).startswith("a text holds the mark <audio>, and sound is not")


@pytest.fixture
def index_of(
    make_config: Callable[..., Config], toy_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> Callable[[bytes], Index]:
    """The index of a shard."""

    def make(packed: bytes) -> Index:
        (tmp_path / "a.tar").write_bytes(packed)
        source = SourceConfig(annotations=str(tmp_path / "a.tar"))
        config = make_config(sources=(source,), index_dir=str(tmp_path / "index"))
        return open_index(config, toy_tokenizer)

    return make


def test_captions_and_members_of_a_shard(index_of: Callable[[bytes], Index]) -> None:
    members = {"0.png": png(), "0.txt": b"<video> a cat", "1.wav": b"?", "1.txt": b"a cat"}
    beside = json.dumps({"video": "a.mp4"}).encode()
    members |= {"2.png": png(), "2.txt": b"a cat", "2.json": beside}
    reasons = {bad["id"]: bad["reason"] for bad in index_of(tar_bytes(members)).bad()}
    tail = "; only text and images are"
    assert reasons == {
        "0": f"a text holds the mark <video>, and video is not read yet{tail}",
        "1": f"member '1.wav' holds a sound, which is not read yet{tail}",
        "2": f"key 'video' of '2.json' holds a video, which is not read yet{tail}",
    }
