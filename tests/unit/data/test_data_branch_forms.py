"""`branches` in the forms that have them: the sample it makes, what is wrong, and other forms."""

from __future__ import annotations

import base64
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dattn_mcore.config.schema import Config
from dattn_mcore.data.index.store import open_index
from dattn_mcore.data.sources.metadata import known_metadata
from dattn_mcore.data.sources.record import Inside, Sample, ToolUse
from dattn_mcore.data.sources.records.forms import FORMS, matching, parse_record
from dattn_mcore.data.tokenizer import SentencePieceTokenizer
from dattn_mcore.errors import DataError

HUMAN, GPT = {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}
SHOWS = {"from": "human", "value": "<image>a"}
CALLED = {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}
OBSERVED = {"from": "observation", "value": "c"}
USER, BOT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
PNG = base64.b64encode(b"\x89PNG").decode()
WITH = ("llava", "sharegpt", "messages")


def read(form: str, record: dict[str, Any]) -> Sample:
    found = FORMS[form]
    return parse_record(record, "key", known_metadata(()) | found.metadata, found)


def test_llava() -> None:
    record = {
        "id": 7,
        "image": ["1.jpg", "2.jpg"],
        "system": "S",
        "weight": 0.5,
        "model": "m",
        "branches": [
            [{"from": "human", "value": "<image>a<image>"}, {**GPT, "model": "m"}],
            [GPT, HUMAN, {**GPT, "loss": False}, {**HUMAN, "value": "<image><image>"}, GPT],
        ],
    }
    assert matching(record) == ["llava"]
    assert read("llava", record) == Sample(
        id="7",
        images=("1.jpg", "2.jpg"),
        turns=(),
        ignored=("model", "conversations[].model", "a first turn from gpt"),
        weight=0.5,
        branches=(
            Sample("7", (), ("<image>a<image>", "b"), "S", weight=0.5),
            Sample(
                "7", (), ("a", "b", "<image><image>", "b"), "S", learned=(False, True), weight=0.5
            ),
        ),
    )


def test_sharegpt() -> None:
    record = {
        "image": "1.jpg",
        "tools": '[{"name": "f"}]',
        "branches": [[SHOWS, CALLED, OBSERVED, GPT], [SHOWS, GPT]],
    }
    assert matching(record) == ["sharegpt"]
    tools = ('{"name": "f"}',)
    call = ('{"name": "f", "arguments": {}}',)
    assert read("sharegpt", record) == Sample(
        id="key",
        images=("1.jpg",),
        turns=(),
        branches=(
            Sample(
                "key",
                (),
                ("<image>a", "", "", "b"),
                tool_use=ToolUse(tools, (call, ()), ((), ("c",))),
            ),
            Sample("key", (), ("<image>a", "b"), tool_use=ToolUse(tools, ((),), ((),))),
        ),
    )


def test_messages() -> None:
    """Marks in one branch, typed parts in another, and images in front where there is no mark."""
    parts = [{"type": "image"}, {"type": "text", "text": "c"}]
    record = {
        "images": ["1.jpg"],
        "branches": [
            [{"role": "system", "content": "S"}, {**USER, "content": "a<image>"}, BOT],
            [{**USER, "content": parts}, BOT],
            [USER, BOT],
        ],
    }
    assert matching(record) == ["messages"]
    assert read("messages", record) == Sample(
        id="key",
        images=("1.jpg",),
        turns=(),
        branches=(
            Sample("key", (), ("a<image>", "b"), "S"),
            Sample("key", (), ("<image>c", "b")),
            Sample("key", (), ("<image>a", "b")),
        ),
    )


def test_parts_may_name_the_images_again() -> None:
    inside = {"image": f"data:image/png;base64,{PNG}"}
    turns = [{**USER, "content": [inside, {"text": "a"}]}, BOT]
    found = read("messages", {"branches": [turns, turns]})
    (image,) = found.images
    assert isinstance(image, Inside)
    assert [branch.turns for branch in found.branches] == [("<image>a", "b")] * 2


FEW = "'branches' must be a list of at least two lists of turns, got "
FAULTS: list[tuple[str, dict[str, Any], str]] = [
    ("llava", {"branches": [[HUMAN, GPT]]}, f"{FEW}one"),
    (
        "llava",
        {"branches": [[HUMAN, GPT]] * 2, "conversations": [HUMAN, GPT]},
        "'conversations' and 'branches' both hold turns; give one of them",
    ),
    (
        "llava",
        {"image": "1", "branches": [[SHOWS, GPT], [HUMAN, GPT]]},
        "branch 1: 0 <image> mark(s) in the conversation but 1 image(s) in 'image'; there must be "
        "one mark for each image",
    ),
    (
        "llava",
        {"branches": [[HUMAN, GPT], [HUMAN, CALLED]]},
        "branch 1: turn 1: 'from' is 'function_call'; it must be 'human', 'gpt' or 'system'; turns "
        "of tools belong to format: sharegpt",
    ),
    ("llava", {"branches": []}, "key 'conversations' is missing"),
    ("sharegpt", {"branches": {"a": 1}}, f"{FEW}an object"),
    (
        "sharegpt",
        {"branches": [[HUMAN, CALLED, GPT], [HUMAN, GPT]]},
        "branch 0: turn 2 is from 'gpt' where 'human' is due; turns alternate, human first",
    ),
    (
        "sharegpt",
        {"branches": [[HUMAN, GPT], HUMAN]},
        "branch 1 must be a non-empty list of turns, got an object",
    ),
    (
        "messages",
        {"branches": [[USER, BOT], []]},
        "branch 1 must be a non-empty list of turns, got an empty list",
    ),
    (
        "messages",
        {"branches": [[USER, BOT]] * 2, "prompt": [USER], "completion": [BOT]},
        "'prompt' and 'branches' both hold turns; give one of them",
    ),
    (
        "messages",
        {
            "branches": [
                [{**USER, "content": [{"image": "1"}, {"text": "a"}]}, BOT],
                [{**USER, "content": [{"image": "2"}, {"text": "a"}]}, BOT],
            ]
        },
        "branch 1 shows other images than branch 0; all branches of a record are about the same "
        "images, in the same order",
    ),
    (
        "messages",
        {"branches": [[USER, BOT], [USER]]},
        "branch 1: the last of 1 messages is from 'user'; an answer must follow",
    ),
]


@pytest.mark.parametrize(("form", "record", "reason"), FAULTS)
def test_a_broken_record(form: str, record: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError) as raised:
        read(form, record)
    assert str(raised.value) == reason


def test_every_form_that_has_branches_has_three_faults() -> None:
    names = [form for form, _, _ in FAULTS]
    assert all(names.count(name) >= 3 for name in WITH) and set(names) == set(WITH)
    able = {name for name, form in FORMS.items() if form.branch_turns}
    assert able == {*WITH, "webdataset"}  # whose records are LLaVA's


@pytest.mark.parametrize("form", sorted({*FORMS} - {*WITH, "webdataset"}))
def test_other_forms_refuse_them(form: str) -> None:
    turns = [[USER, BOT]] * 2 if form == "swift" else [[HUMAN, GPT]] * 2
    whole = {
        "swift": {"query": "a", "response": "b"},
        "llama_factory": {"instruction": "a", "output": "b"},
        "cauldron": {"texts": [{"user": "a", "assistant": "b"}]},
        "interleaved": {"texts": ["a"], "images": [None]},
        "pixmo": {"image": "1.jpg", "question": "a", "answer": "b"},
        "energon": {"context": "a", "answers": "b"},
    }[form]
    read(form, whole)
    with pytest.raises(DataError, match=r"key 'branches' is neither used nor known metadata"):
        read(form, {**whole, "branches": turns})


def _written(folder: Path, records: list[dict[str, Any]]) -> dict[str, Path]:
    """The records in every container: images beside them, and in a shard."""
    image = io.BytesIO()
    Image.new("RGB", (40, 40)).save(image, "PNG")
    (folder / "1.png").write_bytes(image.getvalue())
    files = {name: folder / f"talk.{name}" for name in ("json", "jsonl", "tar", "parquet")}
    files["json"].write_text(json.dumps(records))
    files["jsonl"].write_text("".join(f"{json.dumps(record)}\n" for record in records))
    with tarfile.open(files["tar"], "w") as shard:
        for number, record in enumerate(records):
            alone = {key: value for key, value in record.items() if key != "image"}
            for suffix, data in (("png", image.getvalue()), ("json", json.dumps(alone).encode())):
                member = tarfile.TarInfo(f"{number:03}.{suffix}")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
    return files


@pytest.mark.parametrize("container", ["json", "jsonl", "tar", "parquet", "parquet-texts"])
def test_any_container_holds_them(
    make_config: Callable[..., Config],
    toy_tokenizer: SentencePieceTokenizer,
    tmp_path: Path,
    container: str,
) -> None:
    plain = {"image": "1.png", "conversations": [SHOWS, GPT]}
    records = [{"image": "1.png", "branches": [[SHOWS, GPT], [SHOWS, GPT, HUMAN, GPT]]}, plain]
    files = _written(tmp_path, records)
    if container.startswith("parquet"):
        pyarrow = pytest.importorskip("pyarrow", reason="the extra 'parquet' is not installed")
        parquet = pytest.importorskip("pyarrow.parquet")
        records = [{"conversations": None, **records[0]}, {"branches": [], **plain}]
        if container == "parquet-texts":  # turns as JSON texts, in rows that all have branches
            records = [{"image": "1.png", "branches": json.dumps(records[0]["branches"])}] * 2
        parquet.write_table(pyarrow.Table.from_pylist(records), files["parquet"])
    settings = make_config(
        annotations=str(files[container.partition("-")[0]]), image_folder=str(tmp_path)
    )
    index = open_index(settings, toy_tokenizer)
    assert index.settings.sources[0].form == "llava"
    assert not list(index.bad())
    found = [index.sample(number).branches for number in range(2)]
    assert [len(branches) for branches in found] == (
        [2, 2] if container == "parquet-texts" else [2, 0]
    )
    first, second = found[0]
    assert second.text_rows > first.text_rows and first.text_before == second.text_before


def test_the_example_of_the_docs() -> None:
    page = Path(__file__).parents[3] / "docs" / "data.md"
    lines = page.read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith('`{"image"') and '"branches"' in line)
    record = json.loads(line.strip("`"))
    assert matching(record) == ["llava"] and len(read("llava", record).branches) == 2
