"""Three broken records of every form, and the one line that each gives. Whole ones: `shapes_*`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dattn_mcore.config.schema import DataConfig, MappingConfig, SourceConfig
from dattn_mcore.data.sources.configured import configured_sources
from dattn_mcore.data.sources.metadata import known_metadata
from dattn_mcore.data.sources.record import Sample
from dattn_mcore.data.sources.records.forms import FORMS, parse_record
from dattn_mcore.data.sources.records.mapping import mapped_form
from dattn_mcore.data.sources.source import open_source_file
from dattn_mcore.errors import DataError
from tests.unit.data.shapes import png, tar_bytes

PNG = png()
USER, BOT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
HUMAN, GPT = {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}
CALLED = {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}
MAPPED = MappingConfig(images="i[].p", turns="t[]", role="r", text="x", user="u", assistant="b")
PAIRED = MappingConfig(question="q", answer="a[0].b")


def aside(key: str) -> str:
    return (
        f"key '{key}' is neither used nor known metadata; name it in data.metadata_keys if "
        "training may leave it aside"
    )


FAULTS: list[tuple[str, dict[str, Any], str]] = [
    (
        "llava",
        {"conversations": [{**HUMAN, "value": "<image>"}, GPT]},
        "1 <image> mark(s) in the conversation but 0 image(s) in 'image'; there must be one mark "
        "for each image",
    ),
    (
        "llava",
        {"image": "1", "images": ["1"], "conversations": [HUMAN, GPT]},
        "'image' and 'images' both hold images; give one of them",
    ),
    (
        "llava",
        {"conversations": [HUMAN, CALLED]},
        "turn 1: 'from' is 'function_call'; it must be 'human', 'gpt' or 'system'; turns of tools "
        "belong to format: sharegpt",
    ),
    (
        "llava",
        {"conversations": [HUMAN, {**GPT, "loss": "no"}]},
        "turn 1: 'loss' must be true or false, got a string",
    ),
    (
        "llava",
        {"conversations": [HUMAN, {**GPT, "loss": False}]},
        "'loss' is false for every answer; there is nothing to learn from it",
    ),
    (
        "sharegpt",
        {"conversations": [HUMAN, CALLED, GPT]},
        "turn 2 is from 'gpt' where 'human' is due; turns alternate, human first",
    ),
    (
        "sharegpt",
        {"conversations": [HUMAN, {**CALLED, "value": "f()"}]},
        "turn 1 holds malformed JSON (Expecting value at character 0)",
    ),
    (
        "sharegpt",
        {"conversations": [HUMAN, GPT, {"from": "observation", "value": "c"}, GPT]},
        "turn 2 is from 'observation', and no call of a tool stands before it",
    ),
    (
        "sharegpt",
        {"conversations": [HUMAN, CALLED, HUMAN, GPT]},
        "turn 2 is from 'human', and the call of a tool before it has no response",
    ),
    (
        "sharegpt",
        {"conversations": [HUMAN, GPT], "tools": {"a": 1}},
        "'tools' must be a list of objects, got an object",
    ),
    (
        "messages",
        {"messages": [USER]},
        "the last of 1 messages is from 'user'; an answer must follow",
    ),
    (
        "messages",
        {"messages": [BOT, USER, BOT]},
        "message 0 is from 'assistant' where 'user' is due; messages alternate, user first",
    ),
    (
        "messages",
        {"messages": [{**USER, "role": "human"}, BOT]},
        "message 0: 'role' is 'human'; it must be 'user', 'assistant', 'system' or 'tool'",
    ),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, BOT]},
        "1 image part(s) without an image of their own but 0 image(s) in 'images'; there must be "
        "one part for each image",
    ),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "file", "file": {"a": 1}}]}, BOT]},
        "message 0, part 0: 'type' is 'file'; it must be 'text', 'image' or 'image_url'",
    ),
    (
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"image": "1"}, {"text": "<image> a"}]},
                BOT,
            ]
        },
        "message 0: <image> stands in a text beside image parts; use one way",
    ),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"image": "data:image/png,AAAA"}]}, BOT]},
        "message 0, part 0: 'image' is a data URI that begins 'data:image/png,AAAA'; it must be "
        "'data:image/...;base64,...'",
    ),
    (
        "messages",
        {"messages": [USER, {"role": "assistant", "content": None}]},
        "message 1: 'content' must be a string, got null",
    ),
    (
        "messages",
        {"messages": [USER, {**BOT, "reasoning_content": "hm"}]},
        "message 1: " + aside("reasoning_content"),
    ),
    (
        "messages",
        {"messages": [USER, {**BOT, "weight": 0.5}]},
        "message 1: 'weight' is a number that is not 0 or 1, or beside 'loss'",
    ),
    (
        "messages",
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"id": "1"}]}]},
        "message 1: the call of a tool must be an object with a 'name'",
    ),
    ("swift", {"query": "a", "response": None}, "'response' must be a string, got null"),
    (
        "swift",
        {"query": "a", "response": "b", "history": [["c"]]},
        "'history'[0] must be a list of a question and an answer",
    ),
    (
        "swift",
        {"query": "<image>a", "response": "b", "images": ["1", "2"]},
        "1 <image> mark(s) in the conversation but 2 image(s) in 'images'; there must be one mark "
        "for each image",
    ),
    (
        "llama_factory",
        {"instruction": "a", "output": 3},
        "'output' must be a string, got a number",
    ),
    (
        "llama_factory",
        {"instruction": "a", "output": "b", "images": ["1"]},
        "0 <image> mark(s) in the conversation but 1 image(s) in 'images'; there must be one mark "
        "for each image",
    ),
    (
        "llama_factory",
        {"instruction": "a", "output": "b", "history": {"c": "d"}},
        "'history' must be a list of pairs, got an object",
    ),
    ("cauldron", {"texts": []}, "'texts' must be a non-empty list, got an empty list"),
    (
        "cauldron",
        {"texts": [{"user": "a"}]},
        "text 0: 'assistant' must be a string, got null",
    ),
    (
        "cauldron",
        {"texts": [{"user": "a", "assistant": "b", "video": "1"}]},
        "text 0: key 'video' holds a video, which is not read yet; only text and images are",
    ),
    (
        "interleaved",
        {"texts": ["a"], "images": []},
        "'texts' has 1 entries and 'images' 0; they must be as many, null where the other list "
        "holds something",
    ),
    (
        "interleaved",
        {"texts": ["a", None], "images": ["1", None]},
        "entry 0: both of 'texts' and 'images' hold something; one must",
    ),
    (
        "interleaved",
        {"texts": [None], "images": ["1"]},
        "the document holds no text; there is nothing to learn from it",
    ),
    (
        "interleaved",
        {"texts": ["an <image> tag"], "images": [None]},
        "1 <image> mark(s) in the text but 0 image(s) in 'images'; a text of an interleaved "
        "document holds no marks of its own",
    ),
    (
        "interleaved",
        {"text_list": ["a"], "image_info": [{"image_name": "1", "matched_text_index": 1}]},
        "image 0: 'matched_text_index' is 1; it must be from 0 to 0",
    ),
    (
        "pixmo",
        {"caption": "a"},
        "'image' is missing; a caption or an answer belongs to an image",
    ),
    (
        "pixmo",
        {"image": "1", "caption": "a", "question": "b", "answer": "c"},
        "'caption' and 'question' are both there; make a sample of each",
    ),
    (
        "pixmo",
        {"image": "1", "question": "b", "answer": ["c"]},
        "'answer' must be a string, got a list",
    ),
    ("pixmo", {"image": "1", "caption": "a", "points": [1]}, aside("points")),
    (
        "energon",
        {"context": "a", "answers": []},
        "'answers' holds 0 different answers; which one is learned must not depend on chance: "
        "keep one",
    ),
    (
        "energon",
        {"context": ["a"], "answers": "b"},
        "'context' must be a string, got a list",
    ),
    (
        "energon",
        {"texts": [USER, BOT], "media": "mix", "name": []},
        "'media' is 'mix'; only text and images are read",
    ),
    ("webdataset", {"width": 7}, "key 'conversations' is missing"),
    ("webdataset", {"conversations": 7}, "'conversations' must be a non-empty list, got a number"),
    ("webdataset", {"url": "u", "text": "a"}, aside("text")),
    ("mapping", {"t": []}, "'t[]' must be a non-empty list, got an empty list"),
    ("mapping", {"t": {"r": "u"}}, "'t[]': a list is due, got an object"),
    (
        "mapping",
        {"t": [{"r": "x", "x": "a"}]},
        "turn 0: 'r' is 'x'; it must be 'u', 'b' or 'system'",
    ),
    ("mapping", {"t": [{"r": "u", "x": "a"}], "z": 1}, aside("z")),
    ("paired", {"q": "a", "a": []}, "'a[0].b': the list has 0 entries and no [0]"),
    ("paired", {"q": "a", "a": [7]}, "'a[0].b': 'b' is looked for in a number, no object"),
    ("paired", {"q": {"x": 1}, "a": [{"b": "c"}]}, "'q' must be a string, got an object"),
]


@pytest.mark.parametrize(("form", "record", "reason"), FAULTS)
def test_a_broken_record(form: str, record: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError) as raised:
        read(form, record)
    assert str(raised.value) == reason


def read(form: str, record: dict[str, Any]) -> Sample:
    own = {"mapping": mapped_form(MAPPED), "paired": mapped_form(PAIRED)}
    found = own.get(form) or FORMS[form]
    known = known_metadata(()) | found.metadata
    return parse_record(record, "a", known, found)


CAPTIONS: dict[str, tuple[dict[str, bytes], str]] = {
    "empty": (
        {"0.png": PNG, "0.txt": b""},
        "this sample of the shard has no .json or .txt member, or an empty one",
    ),
    "of spaces": (
        {"0.png": PNG, "0.txt": b" \n"},
        "every answer is empty; there is nothing to learn from it",
    ),
    "two": (
        {"0.png": PNG, "0.txt": b"a", "0.caption": b"b"},
        "members '0.txt' and '0.caption' are both texts of one sample; members of a sample share "
        "their name up to its first dot, and one is its text",
    ),
    "not UTF-8": (
        {"0.png": PNG, "0.txt": b"caf\xe9"},
        "not UTF-8 (unexpected end of data at byte 3)",
    ),
    "without an image": (
        {"0.txt": b"a"},
        "caption '0.txt' has no image beside it; members of a sample must stand next to each "
        "other in the shard",
    ),
    "with a mark": (
        {"0.png": PNG, "0.txt": b"an <image>"},
        "2 <image> mark(s) in the conversation but 1 image(s) in 'image'; there must be one mark "
        "for each image",
    ),
}


@pytest.mark.parametrize("name", list(CAPTIONS))
def test_a_broken_caption(name: str, tmp_path: Path) -> None:
    members, reason = CAPTIONS[name]
    whole = {"9.png": PNG, "9.txt": b"a cat"}
    (tmp_path / "a.tar").write_bytes(tar_bytes({**members, **whole}))
    data = DataConfig(sources=(SourceConfig(annotations=str(tmp_path / "a.tar")),))
    (source,) = configured_sources(data)
    assert source.form == "webdataset"
    file = open_source_file(source, 0)
    broken, other = file.scan()
    with pytest.raises(DataError) as raised:
        file.read(broken)
    assert str(raised.value) == reason
    assert file.read(other)[0].turns == ("<image>", "a cat")
    file.close()


def test_every_form_has_three() -> None:
    names = [form for form, _, _ in FAULTS]
    assert {*FORMS, "mapping", "paired"} == set(names)
    assert all(names.count(name) >= 3 for name in names)


def test_a_mapping_reads_turns_and_what_is_beside() -> None:
    mapping = MappingConfig(
        id="m.n",
        images="i[].p[].f",
        turns="t.d[]",
        role="who.is",
        text="x",
        user="u",
        assistant="b",
        system="s[1]",
        weight="m.w",
    )
    record = {
        "m": {"n": "x7", "w": 2},
        "i": [{"p": [{"f": "1"}, {"f": "2"}]}, {"p": []}, {"p": [{"f": "3"}]}],
        "t": {"d": [{"who": {"is": "u"}, "x": "q"}, {"who": {"is": "b"}, "x": "a", "loss": True}]},
        "s": ["no", "S"],
    }
    found = parse_record(record, "a", form=mapped_form(mapping))
    turns = ("<image>" * 3 + "q", "a")
    aside = ("other entries of s",)
    expected = Sample("x7", ("1", "2", "3"), turns, "S", aside, weight=2.0)
    assert found == expected


@pytest.mark.parametrize(
    ("mapping", "reason"),
    [
        (MappingConfig(images="i"), "mapping: give question and answer, or turns with role and"),
        (MappingConfig(question="q"), "mapping: give question and answer, or turns"),
        (MappingConfig(turns="t", role="r"), "mapping: give question and answer, or turns"),
        (
            MappingConfig(question="q", answer="a", turns="t", role="r", text="x"),
            "mapping: give question and answer, or turns",
        ),
        (MappingConfig(question="q..x", answer="a"), "mapping: question: 'q..x' is no path"),
        (MappingConfig(question="q", answer="a[x]"), "mapping: answer: 'a[x]' is no path"),
        (MappingConfig(question="q.", answer="a"), "mapping: question: 'q.' is no path"),
    ],
)
def test_a_mapping_that_cannot_be(mapping: MappingConfig, reason: str) -> None:
    with pytest.raises(DataError) as raised:
        mapped_form(mapping)
    assert str(raised.value).startswith(reason)
