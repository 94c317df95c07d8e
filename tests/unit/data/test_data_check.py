"""`check`: faults by kind, places of records without an id, a tokenizer that does not fit first."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from PIL import Image

from dattn_mcore.config.schema import Config
from dattn_mcore.data.__main__ import main
from dattn_mcore.data.failures import check_share
from dattn_mcore.data.index.store import open_index
from dattn_mcore.data.sample_failure import kind_of
from dattn_mcore.data.sources.json_file import JsonFile
from dattn_mcore.data.tokenizer import SentencePieceTokenizer
from dattn_mcore.errors import DataError

TALK = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "7"}]
ASK = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": "7"}]


@pytest.fixture
def command(tmp_path: Path, toy_model: Path) -> Callable[..., int]:
    """Runs a command over `a.json` below `tmp_path`."""

    def run(name: str, *arguments: str, tokenizer: Path = toy_model) -> int:
        settings = [
            f"data.annotations={tmp_path / 'a.json'}",
            f"data.image_folder={tmp_path}",
            f"data.tokenizer={tokenizer}",
            "data.template=mistral",
            "data.prepare=none",
            "model.vision.image_size=56",
            "model.vision.patch_size=14",
        ]
        return main([name, "--workers", "0", *arguments, *settings])

    return run


def test_faults_are_grouped_by_kind(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (56, 56)).save(tmp_path / "is.png")
    records: list[dict[str, Any]] = [
        {"id": f"v{number}", "video": f"{number}.mp4", "conversations": TALK}
        for number in range(740)
    ]
    records += [
        {"id": f"m{number}", "image": f"d{number}/gone-{number}.jpg", "conversations": ASK}
        for number in range(30)
    ]
    records += [
        {"id": f"{letter}", "image": f"{letter}.jpg", "conversations": ASK}
        for letter in ("lost", "image", "n")  # an id or a name that the rule's own words have
    ]
    records += [{"id": "x", "clip": "a", "conversations": TALK}]
    records += [{"id": "ok", "image": "is.png", "conversations": ASK}]
    (tmp_path / "a.json").write_text(json.dumps(records))
    assert command("check", "--report", str(tmp_path / "all.jsonl")) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.strip().split("  ")[0] for line in lines[:3]] == [
        "740 x annotation",
        "33 x image",
        "1 x annotation",
    ]
    assert "first 'v0'" in lines[0] and "key 'video' holds a video" in lines[0]
    assert "first 'm0'" in lines[1] and "image 'd0/gone-0.jpg' does not exist" in lines[1]
    assert "first 'x'" in lines[2] and "key 'clip' is neither" in lines[2]
    assert lines[3] == f"all are in {tmp_path / 'all.jsonl'}"
    assert lines[4].startswith("775 samples, 1 images: 774 cannot be trained on")
    assert len((tmp_path / "all.jsonl").read_text().splitlines()) == 774


def test_a_run_that_is_refused_names_kinds(
    make_config: Callable[..., Config], toy_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    records = [{"id": f"v{n}", "video": "x", "conversations": TALK} for n in range(9)]
    records += [{"id": "x", "clip": "a", "conversations": TALK}]
    records += [{"id": "y", "conversations": []}]
    path = tmp_path / "a.json"
    path.write_text("[\n" + ",\n".join(map(json.dumps, records)) + "\n]")
    index = open_index(make_config(annotations=str(path)), toy_tokenizer)
    with pytest.raises(DataError) as raised:
        check_share(index, 0.0)
    said = str(raised.value)
    assert f"9 like '{path}' line 2 (index 0, form llava) sample 'v0': key 'video'" in said
    assert "sample 'x': key 'clip'" in said and "sample 'y': 'conversations'" in said
    assert "more" not in said


def test_a_kind_has_no_names_and_numbers_of_its_sample() -> None:
    first = kind_of("image 'd1/a-1.jpg' is 7 x 9; 'a-1.png' is there", "a", "d1/a-1.jpg")
    assert first == kind_of("image 'x/b.jpg' is 17 x 8; 'b.png' is there", "b", "x/b.jpg")
    assert kind_of("key 'video' is", "a", None) != kind_of("key 'audio' is", "a", None)


@pytest.mark.parametrize("name", ["index", "check", "stats", "preview"])
def test_a_tokenizer_that_lacks_a_token_is_reported_before_indexing(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = tmp_path / "no_inst"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["Which digit is in the cell", "user model"]),
        model_prefix=str(path),
        vocab_size=30,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "a.json").write_text(json.dumps([{"id": "a", "conversations": TALK}] * 9))
    assert command(name, tokenizer=path.with_suffix(".model")) == 2
    said = capsys.readouterr()
    assert (
        said.err.count("\n") == 1 and "has no token '[INST]', which data.template needs" in said.err
    )
    assert not (tmp_path / ".index").exists()


def read_all(path: Path) -> list[tuple[str, str]]:
    file = JsonFile(path, "")
    found = [(file.read(place)[0].id, file.line(place.offset)) for place in file.scan()]
    file.close()
    return found


def test_a_record_without_an_id_gets_its_place(tmp_path: Path) -> None:
    nameless: list[dict[str, Any]] = [{"conversations": TALK}, {"id": None, "conversations": TALK}]
    records = [*nameless, {"id": "a", "conversations": TALK}, {"id": "", "conversations": TALK}]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(records))
    assert [name for name, _ in read_all(path)] == ["a.json[0]", "a.json[1]", "a", "a.json[3]"]
    lines = tmp_path / "a.jsonl"
    lines.write_text("\ufeff\n" + "\n\n".join(map(json.dumps, records)) + "\n")
    assert read_all(lines) == [
        ("a.jsonl:2", "line 2"),
        ("a.jsonl:4", "line 4"),
        ("a", "line 6"),
        ("a.jsonl:8", "line 8"),
    ]


def test_the_place_in_a_list_of_one_line_is_an_index(
    make_config: Callable[..., Config], toy_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    good, bad = {"conversations": TALK}, {"conversations": []}
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps([good, bad, good, 3]))
    index = open_index(make_config(annotations=str(tmp_path / "*.json")), toy_tokenizer)
    found = [(entry["id"], entry["where"]) for entry in index.bad()]
    assert found == [
        (f"{name}[{number}]", f"'{tmp_path / name}' line 1 (index {number}, form llava)")
        for name in ("a.json", "b.json")
        for number in (1, 3)
    ]
    assert index.sample(2).id == "a.json[2]"
