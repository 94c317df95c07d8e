"""Annotation files: what is accepted, and the one line each mistake gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dattn_mcore.data.sources.json_file import JsonFile
from dattn_mcore.errors import DataError
from tests.unit.data.read_json import read_json

GOOD: dict[str, Any] = {
    "id": "a",
    "image": "x/1.jpg",
    "conversations": [
        {"from": "human", "value": "<image>\nwhat?"},
        {"from": "gpt", "value": "a cat"},
    ],
}

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT | st.sampled_from(['"', "\\", "]},{[", '\\"']),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


def _turns(*speakers: str, first: str = "<image>\nwhat?") -> list[dict[str, str]]:
    return [
        {"from": speaker, "value": first if number == 0 else "y"}
        for number, speaker in enumerate(speakers)
    ]


def _write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    return path


def test_reads_json_and_json_lines_alike(tmp_path: Path) -> None:
    records = [GOOD, {**GOOD, "id": "b", "image": ["1.jpg"]}]
    as_list = read_json(_write(tmp_path, "\ufeff" + json.dumps(records, indent=1)))
    lines = tmp_path / "a.jsonl"
    lines.write_text("\n".join(json.dumps(one) for one in records) + "\n\n")
    as_lines = read_json(lines)
    assert as_list == as_lines
    assert [sample.id for sample in as_list] == ["a", "b"]
    assert as_list[0].images == ("x/1.jpg",)
    assert as_list[0].turns == ("<image>\nwhat?", "a cat")
    assert JsonFile(lines, "").digest() != JsonFile(tmp_path / "a.json", "").digest()


def test_accepts_text_only_and_several_images(tmp_path: Path) -> None:
    text = {"id": 7, "image": None, "conversations": _turns("human", "gpt", first="hello")}
    two = {
        "id": "two",
        "image": ["1.jpg", "2.jpg"],
        "conversations": [
            {"from": "human", "value": "<image> and"},
            {"from": "gpt", "value": "yes"},
            {"from": "human", "value": "<image>?"},
            {"from": "gpt", "value": ""},
        ],
    }
    samples = read_json(_write(tmp_path, json.dumps([text, two])))
    assert (samples[0].id, samples[0].images) == ("7", ())
    assert samples[1].images == ("1.jpg", "2.jpg")


def test_a_gpt_turn_before_the_first_question_is_left_out(tmp_path: Path) -> None:
    """As LLaVA does."""
    turns = [{"from": "gpt", "value": "Hello!"}, *GOOD["conversations"]]
    (sample,) = read_json(_write(tmp_path, json.dumps([{**GOOD, "conversations": turns}])))
    assert sample.turns == ("<image>\nwhat?", "a cat")


@pytest.mark.parametrize("greeting", [[], _turns("gpt")])
def test_a_system_turn_is_read(tmp_path: Path, greeting: list[dict[str, str]]) -> None:
    system = {"from": "system", "value": "Be short."}
    as_turn = {**GOOD, "conversations": [system, *greeting, *GOOD["conversations"]]}
    as_key = {**GOOD, "system": "Be short.", "conversations": [*greeting, *GOOD["conversations"]]}
    empty = {
        **GOOD,
        "system": "",
        "conversations": [{**system, "value": ""}, *GOOD["conversations"]],
    }
    samples = read_json(_write(tmp_path, json.dumps([as_turn, as_key, GOOD, empty])))
    assert [sample.system for sample in samples] == ["Be short.", "Be short.", "", ""]
    assert {sample.turns for sample in samples} == {("<image>\nwhat?", "a cat")}


BAD_RECORDS = {
    "a system turn in the middle": (
        {**GOOD, "conversations": _turns("human", "gpt", "system", "human", "gpt")},
        "turn 2 is from 'system'; only the first turn can be",
    ),
    "two system turns": (
        {**GOOD, "system": "a", "conversations": _turns("system", "human", "gpt", first="b")},
        "a 'system' key and a system turn; give one",
    ),
    "a system of the wrong type": ({**GOOD, "system": ["a"]}, "'system' must be a string"),
    "an image in a system turn": (
        {**GOOD, "system": "<image>"},
        "<image> stands in the system turn; only human turns may show images",
    ),
    "a system turn alone": (
        {"id": "a", "conversations": _turns("system", first="a")},
        "'conversations' holds a system turn and no other",
    ),
    "not an object": (["x"], "must be an object, got a list"),
    "id of the wrong type": ({**GOOD, "id": ["a"]}, "'id' must be a string, got a list"),
    "image of the wrong type": ({**GOOD, "image": 3}, "'image' must be a path"),
    "empty image path": ({**GOOD, "image": [""]}, "empty or unusable path"),
    "absolute": ({**GOOD, "image": "/etc/passwd"}, "'/etc/passwd' is absolute"),
    "leaves the folder": ({**GOOD, "image": "a/../../b.jpg"}, "leaves the image folder"),
    "half a character in the id": ({**GOOD, "id": "a\ud800"}, r"'id' holds the lone surrogate"),
    "half a character in a path": (
        {**GOOD, "image": "x/\udfff.jpg"},
        r"'image' holds the lone surrogate '\udfff' at character 2",
    ),
    "half a character in a turn": (
        {**GOOD, "conversations": _turns("human", "gpt", first="<image> \ud800")},
        r"turn 0 holds the lone surrogate '\ud800' at character 8",
    ),
    "no conversations": ({"id": "a", "image": "1.jpg"}, "key 'conversations' is missing"),
    "empty conversations": ({**GOOD, "conversations": []}, "non-empty list, got an empty list"),
    "turn without value": (
        {**GOOD, "conversations": [{"from": "human"}]},
        "turn 0: key 'value' is missing",
    ),
    "value of the wrong type": (
        {**GOOD, "conversations": [{"from": "human", "value": None}]},
        "turn 0: 'value' must be a string, got null",
    ),
    "unknown speaker": (
        {**GOOD, "conversations": _turns("human", "bot")},
        "turn 1: 'from' is 'bot'; it must be 'human', 'gpt' or 'system'",
    ),
    "gpt twice": (
        {**GOOD, "conversations": _turns("human", "gpt", "gpt")},
        "turn 2 is from 'gpt' where 'human' is due",
    ),
    "gpt alone": ({"id": "a", "conversations": _turns("gpt")}, "the only turn is from 'gpt'"),
    "an image in a leading gpt turn": (
        {**GOOD, "conversations": _turns("gpt", "human", "gpt")},
        "0 <image> mark(s) in the conversation but 1 image(s)",
    ),
    "human twice": ({**GOOD, "conversations": _turns("human", "human")}, "turn 1 is from 'human'"),
    "no answer": (
        {**GOOD, "conversations": _turns("human", "gpt", "human")},
        "the last of 3 turns is from 'human'",
    ),
    "image without mark": (
        {**GOOD, "conversations": _turns("human", "gpt", first="what?")},
        "0 <image> mark(s) in the conversation but 1 image(s)",
    ),
    "mark without image": (
        {"id": "a", "conversations": _turns("human", "gpt")},
        "1 <image> mark(s) in the conversation but 0 image(s)",
    ),
    "mark in an answer": (
        {
            **GOOD,
            "conversations": [
                {"from": "human", "value": "draw"},
                {"from": "gpt", "value": "<image>"},
            ],
        },
        "stands in a gpt turn",
    ),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_bad_record_names_file_setting_line_and_record(tmp_path: Path, name: str) -> None:
    bad, message = BAD_RECORDS[name]
    text = "[\n" + json.dumps(GOOD, indent=2) + ",\n\n  " + json.dumps(bad) + "\n]"
    line = text.count("\n", 0, text.index(json.dumps(bad))) + 1
    path = _write(tmp_path, text)
    with pytest.raises(DataError) as raised:
        read_json(path)
    said = str(raised.value)
    assert message in said
    assert said.startswith(f"line {line}, record 1: ")
    assert "\n" not in said


def test_bad_record_of_json_lines_names_its_line(tmp_path: Path) -> None:
    path = _write(tmp_path, json.dumps(GOOD) + "\n\n" + json.dumps({"id": "b"}) + "\n")
    with pytest.raises(DataError, match="line 3, record 1: key 'conversations'"):
        read_json(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{}", "line 1: malformed JSON (',' or ']' expected after a record)"),
        ('[\n{"id": 1}\n{"id": 2}]', "line 3: malformed JSON (',' or ']' expected"),
        ('[\n{},\n{"id": "a"', "line 3: malformed JSON (this record never ends)"),
        ("[{},]", "line 1: malformed JSON (a record expected)"),
        ("[{}] {}", "line 1: malformed JSON (nothing may stand behind the list)"),
        ("[" * 100_000, "never ends"),
        ("", "is empty"),
    ],
)
def test_files_whose_brackets_do_not_match(tmp_path: Path, text: str, message: str) -> None:
    path = _write(tmp_path, text)
    with pytest.raises(DataError) as raised:
        list(JsonFile(path, "").scan())
    assert message in str(raised.value)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


# Damage inside one record leaves its neighbours usable, in a list as in lines.
BAD_BYTES = {
    "colon missing": (b'{"id": "a",\n "image" 3}', "malformed JSON (Expecting ':' delimiter"),
    "not UTF-8": (b'{"id": "caf\xe9", "x": "]}"}', "not UTF-8"),
    "number": (b"3", "must be an object, got a number"),
    "text with brackets": (b'"}]{"', "must be an object, got a string"),
    "long number": (b'{"id": ' + b"7" * 5000 + b"}", "malformed JSON (a number of thousands"),
    "deep": (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize("name", BAD_BYTES)
def test_a_damaged_record_is_alone(tmp_path: Path, name: str) -> None:
    raw, message = BAD_BYTES[name]
    good = json.dumps(GOOD).encode()
    path = tmp_path / "a.json"
    path.write_bytes(b"[\n" + good + b",\n" + raw + b",\n" + good + b"\n]\n")
    file = JsonFile(path, "")
    places = list(file.scan())
    assert len(places) == 3
    assert file.read(places[0]) == file.read(places[2])
    with pytest.raises(DataError) as raised:
        file.read(places[1])
    assert message in str(raised.value)


def test_a_damaged_line_is_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([json.dumps(GOOD), '{"id": "a"', json.dumps(GOOD)]))
    file = JsonFile(path, "")
    places = list(file.scan())
    with pytest.raises(DataError, match="malformed JSON"):
        file.read(places[1])
    assert file.read(places[2])[0].id == "a"


@pytest.mark.parametrize("start", ["", "\ufeff", "\n "])
def test_an_object_over_several_lines_is_reported_once(tmp_path: Path, start: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(start + json.dumps({"data": [GOOD] * 9, "by": "ä"}, indent=1))
    message = (
        r"a.json' starts with a JSON object over several lines \(keys 'data', 'by'\); it must be "
        "a list of samples, or one object per line$"
    )
    with pytest.raises(DataError, match=message):
        list(JsonFile(path, "").scan())
    for text in ('{"id": "a"\n' + json.dumps(GOOD), json.dumps(GOOD)):  # one line that is damaged
        path.write_text(start + text)
        assert len(list(JsonFile(path, "").scan())) == text.count("\n") + 1


@settings(max_examples=200, deadline=None)
@given(
    records=st.lists(JSON, max_size=8), indent=st.sampled_from([None, 0, 3]), as_is=st.booleans()
)
def test_the_scanner_finds_what_json_finds(
    tmp_path_factory: pytest.TempPathFactory, records: list[Any], indent: int, as_is: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "scanned.json"
    path.write_text(json.dumps(records, indent=indent, ensure_ascii=not as_is), encoding="utf-8")
    raw = path.read_bytes()
    places = JsonFile(path, "").scan()
    assert [json.loads(raw[p.offset : p.offset + p.length]) for p in places] == records
