"""Marks of images that are not read: refused with their name, or counted where they are words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dattn_mcore.config.schema import Config, MappingConfig, SourceConfig
from dattn_mcore.data.index.store import open_index
from dattn_mcore.data.source_table import source_table
from dattn_mcore.data.sources.record import Sample
from dattn_mcore.data.sources.records.forms import FORMS, parse_record
from dattn_mcore.data.sources.records.mapping import mapped_form
from dattn_mcore.data.tokenizer import SentencePieceTokenizer
from dattn_mcore.errors import DataError
from tests.unit.data.shapes import png

BOT = {"role": "assistant", "content": "b"}
PAIR = MappingConfig(images="i", question="q", answer="a")
PLACE = "which may be the place of an image; write <image> there, one for each image"
MODELS = (
    "which stands for an image in another model's text; put <image> where the image stands and "
    "take the rest out"
)
READ = [  # what each model's own template writes
    "<|vision_start|><|image_pad|><|vision_end|>",
    "<|image_1|>",
    "<|image|>",
    "<IMG_CONTEXT>",
    "<start_of_image>",
    "<image_placeholder>",
    "<ImageHere>",
]


def ask(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}, BOT], **more}


def llava(text: str, **more: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "b"}]
    return {"conversations": turns, **more}


def reason_of(form: str, record: dict[str, Any]) -> str:
    found = mapped_form(PAIR) if form == "mapping" else FORMS[form]
    with pytest.raises(DataError) as raised:
        parse_record(record, "a", form=found)
    return str(raised.value)


@pytest.mark.parametrize("mark", READ)
@pytest.mark.parametrize("images", [[], ["1"]])
def test_a_mark_of_a_model_is_no_text(mark: str, images: list[str]) -> None:
    for text in (f"{mark}a", f"{'<image>' * len(images)}{mark}a"):
        said = reason_of("messages", ask(text, images=images))
        assert said.endswith(MODELS)
        first = mark[: mark.index(">") + 1]
        assert said.startswith(f"a text holds the mark {first} once")
    document = {"texts": [mark, None], "images": [None, "1"]}
    assert reason_of("interleaved", document).endswith(MODELS)


def test_marks_are_counted() -> None:
    text = "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>"
    said = reason_of("llava", llava(f"{text}<|vision_start|>", image="1"))
    assert said == f"a text holds the mark <|vision_start|> 2 times (and 2 more kinds), {MODELS}"


@pytest.mark.parametrize("mark", ["<image_0>", "<image 1>", "<image_00>", "<Image1>", "<image-2>"])
def test_a_numbered_mark_is_the_place_of_an_image(mark: str) -> None:
    """Not in front of the question, where the images of these forms stand without a mark."""
    said = f"a text holds the mark {mark} 2 times, {PLACE}"
    text = f"{mark} and {mark}?"
    assert reason_of("messages", ask(text, images=["1", "2"])) == said
    assert reason_of("mapping", {"i": ["1"], "q": text, "a": "b"}) == said
    assert (
        reason_of("cauldron", {"images": ["1"], "texts": [{"user": text, "assistant": "b"}]})
        == said
    )
    assert reason_of("llava", llava(text, image=["1", "2"])) == said
    assert reason_of("llava", llava(text)) == said
    assert reason_of("llava", llava(f"<image>{text}", image=["1", "2"])) == said
    document = {"texts": [text, None], "images": [None, "1"]}
    read = parse_record(document, "a", form=FORMS["interleaved"])
    assert read.ignored == (f"the words {mark}",)


def test_it_stays_as_words_where_every_image_has_a_mark() -> None:
    text = "<image><image>Is <image 1> like <image 2>?"
    found = parse_record(ask(text, images=["1", "2"]), "a", form=FORMS["messages"])
    words = ("the words <image 1>", "the words <image 2>")
    assert found == Sample("a", ("1", "2"), (text, "b"), ignored=words)
    other = parse_record(ask("<image>What is <div>?", images=["1"]), "a", form=FORMS["messages"])
    assert other.ignored == ()


def test_the_check_names_and_counts_them(
    make_config: Callable[..., Config], toy_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    (tmp_path / "1.png").write_bytes(png())
    records = [
        llava("<image>Is <image 1> red?", image="1.png"),
        llava("<|image_pad|>Red?", image="1.png"),
        llava("Red?"),
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    one = SourceConfig(annotations=str(path))
    index = open_index(make_config(sources=(one,)), toy_tokenizer)
    (bad,) = index.bad()
    assert bad["where"] == f"'{path}' line 2 (index 1, form llava)"
    assert bad["reason"] == f"a text holds the mark <|image_pad|> once, {MODELS}"
    assert source_table(index)[1].split(maxsplit=5) == [
        *("a", "llava", "json", "3", "1"),
        "'the words <image 1>' in 1 samples",
    ]


NAMED = {"<image_00>": "1", "<image_01>": "2"}


def test_marks_that_a_record_gives_its_images_are_read() -> None:
    turns = ("Is <image> like <image> and <image>?", "b")
    record = ask("Is <image_01> like <image_00> and <image_01>?", image=NAMED)
    read = parse_record(record, "a", form=FORMS["messages"])
    assert read == Sample("a", ("2", "1", "2"), turns)
    without = parse_record(ask("a", image=NAMED), "a", form=FORMS["messages"])
    assert without == Sample("a", ("1", "2"), ("<image><image>a", "b"))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (
            ask("<image_00>", image=NAMED),
            "'image' holds an image <image_01>, and no text has that mark",
        ),
        (
            ask("<image_00><image>", image=NAMED),
            "a text holds <image> and 'image' names its images; use one way",
        ),
        (ask("<image_02>", image=NAMED), f"a text holds the mark <image_02> once, {PLACE}"),
        (
            ask("<image_00>", image=NAMED, images=["3"]),
            "'images' and 'image' both hold images; give one of them",
        ),
        (
            ask("<image_00>", image={"<image_00>": 7}),
            "'image'['<image_00>'] must be a path or a list of paths, got a number",
        ),
    ],
)
def test_names_that_do_not_meet_are_refused(record: dict[str, Any], reason: str) -> None:
    assert reason_of("messages", record) == reason


SHOWN = {"role": "user", "content": "a"}


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_a_prompt_that_is_a_copy_is_left_aside(key: str) -> None:
    system = {"role": "system", "content": "s"}
    for prompt in ("a", "s", " a\n"):
        record = {"prompt": prompt, key: [system, SHOWN, BOT]}
        for form in ("messages", "swift"):
            read = parse_record(record, "a", form=FORMS[form])
            assert read == Sample("a", (), ("a", "b"), "s", ("prompt",))
    said = (
        f"'prompt' is a text, and neither the first message of '{key}' nor its first question; "
        "take it out, or make it a message"
    )
    for prompt in ("b", "ab"):
        assert reason_of("messages", {"prompt": prompt, key: [SHOWN, BOT]}) == said
    both = {"prompt": "a", "completion": "b", key: [SHOWN, BOT]}
    assert "two ways to write a sample" in reason_of("messages", both)
