"""A record of a wider form may stand behind those from which a source's form is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dattn_mcore.config.schema import Config, SourceConfig
from dattn_mcore.data.index.store import Index, open_index
from dattn_mcore.data.sources.open_files import OpenFiles
from dattn_mcore.data.sources.record import Sample, ToolUse
from dattn_mcore.data.sources.records.forms import FORMS, LOOKED_AT, WIDENED, parse_record
from dattn_mcore.data.tokenizer import SentencePieceTokenizer
from dattn_mcore.errors import DataError
from tests.unit.data import shapes_llava, shapes_messages
from tests.unit.data.shapes import png, tar_bytes

CALL = '{"name": "f", "arguments": {}}'
TALK = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
TOOLS = [
    TALK[0],
    {"from": "function_call", "value": CALL},
    {"from": "observation", "value": "c"},
    TALK[1],
]
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
CALLED = [
    CHAT[0],
    {"role": "tool_call", "content": CALL},
    {"role": "tool_response", "content": "c"},
    CHAT[1],
]
USED = ToolUse((), ((CALL,), ()), ((), ("c",)))
FIRST = LOOKED_AT + 6
IndexOf = Callable[..., Index]


@pytest.fixture
def index_of(
    make_config: Callable[..., Config], toy_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> IndexOf:
    """The index of one source below `tmp_path`, with a template that has no place for tools."""

    def make(name: str, content: bytes, **source: Any) -> Index:
        (tmp_path / name).write_bytes(content)
        one = SourceConfig(annotations=str(tmp_path / name), **source)
        config = make_config(sources=(one,), index_dir=str(tmp_path / "index"))
        return open_index(config, toy_tokenizer)

    return make


def lines(*records: Any) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


LATER: list[tuple[str, dict[str, Any], dict[str, Any], Sample]] = [
    (
        "llava",
        {"conversations": TALK},
        {"conversations": TOOLS},
        Sample(f"a.jsonl:{FIRST + 1}", (), ("a", "", "", "b"), tool_use=USED),
    ),
    (
        "messages",
        {"messages": CHAT},
        {"messages": CALLED},
        Sample(f"a.jsonl:{FIRST + 1}", (), ("a", "", "", "b"), tool_use=USED),
    ),
    (
        "messages",
        {"messages": CHAT},
        {"query": "a", "response": "b", "history": [["c", "d"]]},
        Sample(f"a.jsonl:{FIRST + 1}", (), ("c", "d", "a", "b")),
    ),
]


@pytest.mark.parametrize(("form", "first", "later", "sample"), LATER)
def test_a_first_record_of_the_wider_form_may_come_late(
    index_of: IndexOf,
    form: str,
    first: dict[str, Any],
    later: dict[str, Any],
    sample: Sample,
) -> None:
    """The template of this test has no place for tools: what stops the sample is not its form."""
    index = index_of("a.jsonl", lines(*[first] * FIRST, later))
    (source,) = index.settings.sources
    assert (source.form, source.detected) == (form, True)
    files = OpenFiles(index.settings.files, most=1)
    opened = files.get(0)
    *before, last = [opened.read(place)[0] for place in opened.scan()]
    files.close()
    assert last == sample
    assert {one.turns for one in before} == {("a", "b")}
    if sample.tool_use is None:
        assert index.num_usable == FIRST + 1
    else:
        (bad,) = index.bad()
        assert index.num_usable == FIRST and "tool" in bad["reason"]


@pytest.mark.parametrize(
    ("form", "first", "later", "reason"),
    [
        (
            "llava",
            {"conversations": TALK},
            {"conversations": TOOLS},
            "turn 1: 'from' is 'function_call'; it must be 'human', 'gpt' or 'system'; turns of "
            "tools belong to format: sharegpt",
        ),
        (
            "messages",
            {"messages": CHAT},
            {"messages": CALLED},
            "message 1: 'role' is 'tool_call'; it must be 'user', 'assistant', 'system' or 'tool'; "
            "turns of ms-swift's tools belong to format: swift",
        ),
    ],
)
def test_a_form_that_is_given_is_kept(
    index_of: IndexOf, form: str, first: dict[str, Any], later: dict[str, Any], reason: str
) -> None:
    """One bad sample, which names the format that reads it; no mixture."""
    index = index_of("a.jsonl", lines(*[first] * FIRST, later), format=form)
    (bad,) = index.bad()
    assert (bad["reason"], index.num_usable) == (reason, FIRST)


def test_a_broken_record_of_the_wider_form_is_one_bad_sample(index_of: IndexOf) -> None:
    broken = {"conversations": [*TOOLS[:2], TALK[0], TALK[1]]}
    index = index_of("a.jsonl", lines(*[{"conversations": TALK}] * FIRST, broken))
    (bad,) = index.bad()
    said = "turn 2 is from 'human', and the call of a tool before it has no response"
    assert bad["reason"] == said


def test_a_record_behind_captions_names_the_format(index_of: IndexOf, tmp_path: Path) -> None:
    members = {}
    for number in range(FIRST):
        members |= {f"{number:03}.png": png(), f"{number:03}.txt": b"a cat"}
    members |= {"x.png": png(), "x.json": json.dumps({"messages": CHAT}).encode()}
    packed = tar_bytes(members)
    with pytest.raises(DataError) as raised:
        index_of("a.tar", packed)
    where, _, rest = str(raised.value).partition(" byte ")
    assert where == f"'{tmp_path / 'a.tar'}'"
    assert rest.partition(" ")[2] == (
        "is a record of messages, and the source is read as webdataset; set format: messages of it"
    )
    assert index_of("a.tar", packed, format="messages").num_usable == FIRST + 1


@pytest.mark.parametrize("name", list(WIDENED))
def test_the_wider_form_reads_all_that_the_narrower_does(name: str) -> None:
    """Every record of the documented shapes, to the same sample."""
    shapes = [*shapes_llava.SHAPES, *shapes_messages.SHAPES]
    found = 0
    for shape in shapes:
        if shape.form == name and isinstance(shape.content, list):
            for record in shape.content:
                narrow = parse_record(record, "a", form=FORMS[name])
                assert parse_record(record, "a", form=WIDENED[name]) == narrow
                found += 1
    assert found > 8
    assert WIDENED[name].used >= FORMS[name].used
    assert WIDENED[name].metadata >= FORMS[name].metadata
