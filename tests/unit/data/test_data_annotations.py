"""Annotation files: what is accepted, and the one line each mistake gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dattn_mcore.data.annotations import read_annotations
from dattn_mcore.errors import DataError

GOOD: dict[str, Any] = {
    "id": "a",
    "image": "x/1.jpg",
    "conversations": [
        {"from": "human", "value": "<image>\nwhat?"},
        {"from": "gpt", "value": "a cat"},
    ],
}


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
    as_list = read_annotations(_write(tmp_path, "\ufeff" + json.dumps(records, indent=1)))
    lines = tmp_path / "a.jsonl"
    lines.write_text("\n".join(json.dumps(one) for one in records) + "\n\n")
    as_lines = read_annotations(lines)
    assert as_list.samples == as_lines.samples
    assert [sample.id for sample in as_list.samples] == ["a", "b"]
    assert as_list.samples[0].images == ("x/1.jpg",)
    assert as_list.samples[0].turns == ("<image>\nwhat?", "a cat")
    assert as_list.fingerprint != as_lines.fingerprint


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
    samples = read_annotations(_write(tmp_path, json.dumps([text, two]))).samples
    assert (samples[0].id, samples[0].images) == ("7", ())
    assert samples[1].images == ("1.jpg", "2.jpg")


BAD_RECORDS = {
    "not an object": (["x"], "must be an object, got a list"),
    "no id": ({"conversations": _turns("human", "gpt")}, "key 'id' is missing"),
    "id of the wrong type": ({**GOOD, "id": ["a"]}, "'id' must be a string, got a list"),
    "image of the wrong type": ({**GOOD, "image": 3}, "'image' must be a path"),
    "empty image path": ({**GOOD, "image": ""}, "empty or unusable path"),
    "absolute": ({**GOOD, "image": "/etc/passwd"}, "'/etc/passwd' is absolute"),
    "leaves the folder": ({**GOOD, "image": "a/../../b.jpg"}, "leaves the image folder"),
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
        {**GOOD, "conversations": _turns("human", "assistant")},
        "turn 1: 'from' is 'assistant'; it must be 'human' or 'gpt'",
    ),
    "gpt first": ({**GOOD, "conversations": _turns("gpt", "human")}, "turn 0 is from 'gpt'"),
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
        read_annotations(path)
    said = str(raised.value)
    assert message in said
    assert said.startswith(f"data.annotations: '{path}' line {line}, record 1")
    assert "\n" not in said
    if isinstance(bad, dict) and isinstance(bad.get("id"), str):
        assert "(id 'a')" in said


def test_bad_record_of_json_lines_names_its_line(tmp_path: Path) -> None:
    path = _write(tmp_path, json.dumps(GOOD) + "\n\n" + json.dumps({"id": "b"}) + "\n")
    with pytest.raises(DataError, match=r"line 3, record 1 \(id 'b'\): key 'conversations'"):
        read_annotations(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[\n{"id": "a",\n "image" 3}]', "line 3 column 10: malformed JSON"),
        ("[{}", "malformed JSON"),
        ("", "line 1 column 1: malformed JSON"),
        ('{"id": "a"\n', "line 1 column 11: malformed JSON line"),
        ("[]", "holds no records"),
        ("3", "must hold a list of records, got a number"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_malformed_files(tmp_path: Path, text: str, message: str) -> None:
    path = _write(tmp_path, text)
    with pytest.raises(DataError) as raised:
        read_annotations(path)
    assert message in str(raised.value)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_missing_file_folder_and_encoding(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.annotations: file '.*nowhere.json' does not exist"):
        read_annotations(tmp_path / "nowhere.json")
    with pytest.raises(DataError, match="not a regular file"):
        read_annotations(tmp_path)
    path = tmp_path / "latin.json"
    path.write_bytes(b'[\n{"id": "caf\xe9"}]')
    with pytest.raises(DataError, match="line 2: not UTF-8"):
        read_annotations(path)
