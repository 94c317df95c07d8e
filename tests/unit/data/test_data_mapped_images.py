"""`mapping:` whose image path runs over the turns: each image stays with its turn."""

from __future__ import annotations

from typing import Any

import pytest

from dattn_mcore.config.schema import MappingConfig
from dattn_mcore.data.sources.record import Sample
from dattn_mcore.data.sources.records.forms import parse_record
from dattn_mcore.data.sources.records.mapping import mapped_form
from dattn_mcore.errors import DataError


def chat(images: str, turns: str = "t[]") -> MappingConfig:
    return MappingConfig(
        images=images, turns=turns, role="r", text="x", user="u", assistant="b", system="s"
    )


def talk(*images: Any, texts: tuple[str, ...] = ("a", "b", "c", "d")) -> list[dict[str, Any]]:
    """Turns; an image that is no list is left out where it is ..."""
    turns: list[dict[str, Any]] = []
    for number, text in enumerate(texts):
        turns.append({"r": "ub"[number % 2], "x": text})
        if number < len(images) and images[number] is not ...:
            turns[-1]["i"] = images[number]
    return turns


def read(mapping: MappingConfig, record: dict[str, Any]) -> Sample:
    return parse_record(record, "a", form=mapped_form(mapping))


@pytest.mark.parametrize("turns", ["t[]", "t"])
@pytest.mark.parametrize(
    ("given", "texts", "images", "said"),
    [
        ((..., ..., "1"), ("a", "b", "c", "d"), ("1",), ("a", "b", "<image>c", "d")),
        (
            ("1", None, "2", ""),
            ("a", "b", "c", "d"),
            ("1", "2"),
            ("<image>a", "b", "<image>c", "d"),
        ),
        (
            (["1", "2"], [], ["3"]),
            ("a<image>,<image>", "b", "c", "d"),
            ("1", "2", "3"),
            ("a<image>,<image>", "b", "<image>c", "d"),
        ),
        (({"path": "1"},), ("a", "b"), ("1",), ("<image>a", "b")),
        ((), ("a", "b"), (), ("a", "b")),
    ],
)
def test_an_image_stays_with_its_turn(
    turns: str, given: tuple[Any, ...], texts: tuple[str, ...], images: Any, said: tuple[str, ...]
) -> None:
    record = {"t": talk(*given, texts=texts)}
    assert read(chat("t[].i", turns), record) == Sample("a", images, said)


def test_lists_in_a_turn_are_its_images() -> None:
    files = [[{"p": "1"}, {"p": "2"}], [], [{"p": "3"}]]
    found = read(chat("t[].i[].p"), {"t": talk(*files)})
    assert found.images == ("1", "2", "3")
    assert found.turns == ("<image><image>a", "b", "<image>c", "d")


def test_images_beside_the_turns_stand_in_front() -> None:
    found = read(chat("i"), {"t": talk(), "i": ["1", "2"]})
    assert found.turns == ("<image><image>a", "b", "c", "d")
    first = read(chat("t[0].i"), {"t": talk("1")})
    assert (first.images, first.turns[0]) == (("1",), "<image>a")


@pytest.mark.parametrize(
    ("mapping", "record", "reason"),
    [
        (
            chat("t[].i"),
            {"t": talk("1", "2")},
            "turn 1: 't[].i' gives an image to a turn from 'b'; only u turns may show images",
        ),
        (
            chat("t[].i"),
            {"t": talk("1", ..., "2", texts=("<image><image>a", "b", "c", "d"))},
            "turn 0: 2 <image> mark(s) in the text but 1 image(s) in 't[].i'; a turn needs one mark "
            "for each of its images, or none",
        ),
        (
            chat("t[].i"),
            {"t": talk(..., ..., "2", texts=("<image>a", "b", "c", "d"))},
            "turn 0: 1 <image> mark(s) in the text but 0 image(s) in 't[].i'; a turn needs one mark "
            "for each of its images, or none",
        ),
        (
            chat("t[].i"),
            {"t": talk(..., ..., 7)},
            "turn 2: 't[].i' must be a path or a list of paths, got a number",
        ),
        (
            chat("p[].i", "p[].t[]"),
            {"p": [{"i": "1", "t": talk()}, {"i": "2", "t": talk()}]},
            "'p[].i' and 'p[].t[]' run over the same list, so the turns of the images are not "
            "known; put <image> into the texts, or images into turns",
        ),
    ],
)
def test_what_cannot_be_placed_is_refused(
    mapping: MappingConfig, record: dict[str, Any], reason: str
) -> None:
    with pytest.raises(DataError) as raised:
        read(mapping, record)
    assert str(raised.value) == reason


def test_marks_say_where_images_of_outer_lists_stand() -> None:
    texts = ("a", "b", "c<image>", "d")
    record = {"p": [{"i": "1", "t": talk(texts=texts)}]}
    found = read(chat("p[].i", "p[].t[]"), record)
    assert (found.images, found.turns) == (("1",), texts)
