"""A record that holds more than its form reads is bad, by the name of what would be dropped."""

from __future__ import annotations

from typing import Any

import pytest

from dattn_mcore.config.schema import MappingConfig
from dattn_mcore.data.sources.metadata import known_metadata
from dattn_mcore.data.sources.record import Sample
from dattn_mcore.data.sources.records.draft import Form
from dattn_mcore.data.sources.records.forms import FORMS, parse_record
from dattn_mcore.data.sources.records.mapping import mapped_form
from dattn_mcore.errors import DataError

USER, BOT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
TURNS = [USER, BOT]
ASK = [{"from": "human", "value": "<image>a"}, {"from": "gpt", "value": "b"}]
CALL = {"role": "tool_call", "content": '{"name": "f"}'}
CALLS = [{"function": {"name": "g"}}]
SHOWN = {"role": "user", "content": [{"type": "image", "image": {"path": "1", "detail": "low"}}]}
PAIR = MappingConfig(images="media.files[].path", question="qa.q", answer="qa.a")
CHAT = MappingConfig(turns="t", role="r", text="x", user="u", assistant="b", images="t[].i")
SAID = [{"r": "u", "x": "a"}, {"r": "b", "x": "b"}]


def two(first: str, second: str) -> str:
    return f"'{first}' and '{second}' are two ways to write a sample; give one of them"


def aside(key: str) -> str:
    return (
        f"key '{key}' is neither used nor known metadata; name it in data.metadata_keys if "
        "training may leave it aside"
    )


def form_of(form: str | MappingConfig) -> Form:
    return mapped_form(form) if isinstance(form, MappingConfig) else FORMS[form]


FAULTS: list[tuple[str | MappingConfig, dict[str, Any], str]] = [
    (
        "messages",
        {"messages": TURNS, "prompt": [USER], "completion": [BOT]},
        two("messages", "prompt"),
    ),
    ("messages", {"messages": TURNS, "completion": [BOT]}, two("messages", "completion")),
    ("messages", {"messages": TURNS, "conversations": TURNS}, two("messages", "conversations")),
    ("messages", {"completion": [BOT]}, "'prompt' must be a non-empty list, got null"),
    ("swift", {"messages": TURNS, "query": "c", "response": "d"}, two("messages", "query")),
    ("swift", {"messages": TURNS, "history": [["c", "d"]]}, two("messages", "history")),
    ("swift", {"conversations": TURNS, "response": "d"}, two("conversations", "response")),
    (
        "swift",
        {"messages": [USER, {**CALL, "tool_calls": CALLS}, BOT]},
        "message 1: 'tool_calls' stands beside the call that 'content' holds",
    ),
    ("energon", {"texts": TURNS, "context": "c", "answers": "d"}, two("texts", "context")),
    ("energon", {"texts": TURNS, "answers": "d"}, two("texts", "answers")),
    (
        "energon",
        {"texts": TURNS, "name": ["1"], "images": ["2"]},
        "'images' and 'name' both hold images; give one of them",
    ),
    (
        "energon",
        {"context": "c", "answers": "d", "media": "video"},
        "'media' is 'video'; only text and images are read",
    ),
    (
        "interleaved",
        {"text_list": ["a"], "image_info": [], "texts": ["b"], "images": [None]},
        two("texts", "text_list"),
    ),
    (
        "interleaved",
        {"text_list": ["a"], "images": ["1"]},
        two("images", "text_list"),
    ),
    (
        "interleaved",
        {"texts": ["b"], "images": [None], "image_info": [{"image_name": "1"}]},
        two("texts", "image_info"),
    ),
    (
        "pixmo",
        {"image": "1", "caption": "a", "answer": "b"},
        "'caption' and 'answer' are both there; make a sample of each",
    ),
    (
        "messages",
        {"messages": [USER, {**BOT, "tool_calls": [{"name": "f", "parameters": {"a": 1}}]}]},
        "message 1: the call of a tool holds 'parameters', which is not read",
    ),
    (
        "messages",
        {"messages": [USER, {**BOT, "tool_calls": [{"custom": {"a": 1}, **CALLS[0]}]}]},
        "message 1: the call of a tool holds 'custom', which is not read",
    ),
    (
        "cauldron",
        {
            "images": [{"path": "1", "text": "a"}],
            "texts": [{"user": "a", "assistant": "b"}],
        },
        "'images': the object of an image holds 'text', which is not read",
    ),
    (
        PAIR,
        {"media": {"files": [{"path": "1", "box": [1]}]}, "qa": {"q": "a", "a": "b"}},
        aside("media.files[].box"),
    ),
    (PAIR, {"qa": {"q": "a", "a": "b", "a2": "c"}}, aside("qa.a2")),
    (CHAT, {"t": [{**SAID[0], "i": "1", "image": "2"}, SAID[1]]}, aside("t[].image")),
    (
        MappingConfig(question="q", answer="a[0].b"),
        {"q": "a", "a": [{"b": "b", "c": "d"}]},
        aside("a[0].c"),
    ),
]


@pytest.mark.parametrize(("form", "record", "reason"), FAULTS)
def test_what_would_be_dropped_is_named(
    form: str | MappingConfig, record: dict[str, Any], reason: str
) -> None:
    found = form_of(form)
    with pytest.raises(DataError) as raised:
        parse_record(record, "a", known_metadata(()) | found.metadata, found)
    assert str(raised.value) == reason


READ: list[tuple[str | MappingConfig, dict[str, Any], Sample]] = [
    ("swift", {"conversations": TURNS, "query": ""}, Sample("a", (), ("a", "b"))),
    (
        "energon",
        {"texts": TURNS, "name": ["1"], "images": []},
        Sample("a", ("1",), ("<image>a", "b")),
    ),
    (
        "messages",
        {"messages": [SHOWN, BOT]},
        Sample("a", ("1",), ("<image>", "b")),
    ),
    (
        PAIR,
        {"media": {"files": [{"path": "1", "width": 8, "clip": ""}]}, "qa": {"q": "a", "a": "b"}},
        Sample("a", ("1",), ("<image>a", "b"), ignored=("media.files[].width",)),
    ),
    (
        CHAT,
        {"t": [{**SAID[0], "i": ["1", "2"], "Model": "m"}, {**SAID[1], "loss": True, "i": ""}]},
        Sample("a", ("1", "2"), ("<image><image>a", "b"), ignored=("t[].Model",)),
    ),
    (
        MappingConfig(question="q", answer="a[0].b"),
        {"q": "a", "a": [{"b": "b"}, {"b": "c", "c": "d"}]},
        Sample("a", (), ("a", "b"), ignored=("other entries of a",)),
    ),
]


@pytest.mark.parametrize(("form", "record", "sample"), READ)
def test_what_is_left_aside_is_counted(
    form: str | MappingConfig, record: dict[str, Any], sample: Sample
) -> None:
    found = form_of(form)
    assert parse_record(record, "a", known_metadata(()) | found.metadata, found) == sample


def test_a_name_that_is_metadata_names_no_image() -> None:
    """Images beside a record are its own where its form does not know the key."""
    record = {"name": "x", "image_info": [1], "conversations": ASK}
    known = known_metadata(("name", "image_info"))
    found = parse_record(record, "a", known, FORMS["llava"], beside=["1.png"])
    assert found.images == ("1.png",)
    assert found.ignored == ("name", "image_info")
    named = {"texts": TURNS, "name": ["2.png"]}
    assert parse_record(named, "a", known, FORMS["energon"], ["1.png"]).images == ("2.png",)
