"""`mapping:` of a source: where the fields of any other record stand, so that nobody writes code.

A path is keys with dots between, `[]` behind one that holds a list, and `[2]` for one entry of it:

    mapping: {images: "media.files[].path", question: "qa.q", answer: "qa.a"}
    mapping: {images: pictures, turns: "dialog[]", role: who, text: says, user: me, assistant: bot}

An image path that runs over the turns (`images: "dialog[].pic"`) gives each turn its own images.

Every key of a record that no path reads, at any depth, must be known metadata, as in any form. Of a
list of which a path names one entry, the others are left aside, and counted.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from typing import Any

from dattn_mcore.config.schema import MappingConfig
from dattn_mcore.data.sources.metadata import is_filled
from dattn_mcore.data.sources.record import Inside, kind
from dattn_mcore.data.sources.records.draft import (
    Draft,
    Form,
    Message,
    Role,
    Words,
    learned_of,
    object_of,
    text_of,
)
from dattn_mcore.data.sources.records.images import image_of
from dattn_mcore.data.sources.records.marks import place_images
from dattn_mcore.data.sources.records.paths import Steps, field_of, steps_of, walk
from dattn_mcore.data.sources.records.unmapped import left_over, tree_of
from dattn_mcore.errors import DataError
from dattn_mcore.types import IMAGE_MARK


def mapped_form(mapping: MappingConfig) -> Form:
    """The form of a source's `mapping:`.

    Raises:
        DataError: It names too little, or a path is malformed.
    """
    check_mapping(mapping)
    paths = (mapping.id, mapping.images, mapping.turns, mapping.question, mapping.answer)
    tops = {steps_of(path)[0] for path in (*paths, mapping.system, mapping.weight) if path}
    top = str(steps_of(mapping.images)[0]) if mapping.images else "images"
    tree = tree_of(_read_paths(mapping))

    def read(record: Mapping[str, Any], known: Collection[str]) -> Draft:
        draft = _read(record, mapping)
        draft.ignored = left_over(record, tree, known)
        return draft

    return Form(
        name="mapping",
        used=frozenset({"id", *map(str, tops)}),
        # What lies beside a record must not take the place of its turns.
        image_key=top if _path_in_a_turn(mapping) is None else "images",
        image_keys=(top,),
        matches=lambda record: False,  # never detected: it is given
        read=read,
        id_of=lambda record: field_of(record, mapping.id or "id"),
    )


def check_mapping(mapping: MappingConfig) -> None:
    """Refuses a mapping that cannot read a conversation.

    Raises:
        DataError: Names what is missing.
    """
    pair = bool(mapping.question) and bool(mapping.answer)
    turns = bool(mapping.turns) and bool(mapping.role) and bool(mapping.text)
    if pair == turns or (bool(mapping.turns) and not turns):
        raise DataError(
            "mapping: give question and answer, or turns with role and text, and not both"
        )
    for name in ("id", "images", "turns", "role", "text", "question", "answer", "system", "weight"):
        path = getattr(mapping, name)
        if path and not steps_of(path):
            raise DataError(
                f"mapping: {name}: '{path}' is no path; write keys with dots between, and [] "
                "behind a list"
            )


def _read_paths(mapping: MappingConfig) -> list[Steps]:
    """All that is read of a record, the keys of its turns included."""
    whole = (mapping.id, mapping.images, mapping.question, mapping.answer, mapping.system)
    paths = [steps_of(path) for path in (*whole, mapping.weight) if path]
    if mapping.turns:
        turn = _steps_of_turns(mapping)
        paths += [turn + steps_of(path) for path in (mapping.role, mapping.text, "loss")]
    return paths


def _read(record: Mapping[str, Any], mapping: MappingConfig) -> Draft:
    words = Words("turn", f"'{mapping.turns or mapping.question}'", images=f"'{mapping.images}'")
    images = []
    own = _path_in_a_turn(mapping)
    if mapping.images and own is None:
        images = _images(field_of(record, mapping.images), words.images)
    if mapping.turns:
        words = Words("turn", words.turns, mapping.user, mapping.assistant, words.images)
        messages = _messages(record, mapping, own, images)
    else:
        words = Words("text", words.turns, mapping.question, mapping.answer, words.images)
        messages = [
            Message("user", mapping.question, _text(record, mapping.question)),
            Message("answer", mapping.answer, _text(record, mapping.answer)),
        ]
    if own is None:
        _place(messages, images, mapping)
    system = field_of(record, mapping.system) if mapping.system else None
    draft = Draft(messages=messages, images=images, words=words)
    if mapping.weight:
        draft.weight = field_of(record, mapping.weight)
    draft.system = "" if system is None else text_of(system, f"'{mapping.system}'")
    return draft


def _text(record: Mapping[str, Any], path: str) -> str:
    return text_of(field_of(record, path), f"'{path}'")


def _images(found: Any, where: str) -> list[str | Inside]:
    if not is_filled(found):
        return []
    return [image_of(one, where) for one in (found if isinstance(found, list) else [found])]


def _steps_of_turns(mapping: MappingConfig) -> Steps:
    """Steps to every turn; the path may be that of their list."""
    steps = steps_of(mapping.turns)
    return steps if None in steps else [*steps, None]


def _path_in_a_turn(mapping: MappingConfig) -> Steps | None:
    """Steps from a turn to its images; None: they do not lie in turns."""
    if not mapping.images or not mapping.turns:
        return None
    turns, images = _steps_of_turns(mapping), steps_of(mapping.images)
    own = images[len(turns) :]
    return own if own and images[: len(turns)] == turns else None


def _place(messages: list[Message], images: list[str | Inside], mapping: MappingConfig) -> None:
    """Puts images that lie beside the turns in front of the first question, unless marks say where.

    Raises:
        DataError: They lie in the lists that the turns are in, each of which has its images.
    """
    if images and mapping.turns and not any(IMAGE_MARK in message.text for message in messages):
        turns, paths = _steps_of_turns(mapping), steps_of(mapping.images)
        pairs = itertools.takewhile(
            lambda pair: pair[0] == pair[1], zip(turns, paths, strict=False)
        )
        if None in [step for step, _ in pairs]:
            raise DataError(
                f"'{mapping.images}' and '{mapping.turns}' run over the same list, so the turns of "
                f"the images are not known; put {IMAGE_MARK} into the texts, or images into turns"
            )
    place_images(messages, images)


def _place_own(
    message: Message, own: list[str | Inside], mapping: MappingConfig, where: str
) -> None:
    """Puts the images of a turn in front of its text, unless marks say where."""
    marks = message.text.count(IMAGE_MARK)
    if own and message.role != "user":
        raise DataError(
            f"{where}: '{mapping.images}' gives an image to a turn from {message.speaker!r}; only "
            f"{mapping.user} turns may show images"
        )
    if marks and marks != len(own):
        raise DataError(
            f"{where}: {marks} {IMAGE_MARK} mark(s) in the text but {len(own)} image(s) in "
            f"'{mapping.images}'; a turn needs one mark for each of its images, or none"
        )
    place_images([message], own)


def _messages(
    record: Mapping[str, Any],
    mapping: MappingConfig,
    own: Steps | None,
    images: list[str | Inside],
) -> list[Message]:
    """The turns; with `own`, steps from a turn to its images, these go to `images`."""
    given = field_of(record, mapping.turns)
    if not isinstance(given, list) or not given:
        raise DataError(f"'{mapping.turns}' must be a non-empty list, got {kind(given)}")
    roles: dict[str, Role] = {
        "system": "system",
        mapping.user: "user",
        mapping.assistant: "answer",
    }
    messages = []
    for number, turn in enumerate(given):
        where = f"turn {number}"
        found = object_of(turn, where)
        speaker = text_of(field_of(found, mapping.role), f"{where}: '{mapping.role}'")
        if speaker not in roles:
            names = f"'{mapping.user}', '{mapping.assistant}' or 'system'"
            raise DataError(f"{where}: '{mapping.role}' is {speaker!r}; it must be {names}")
        text = text_of(field_of(found, mapping.text), f"{where}: '{mapping.text}'")
        messages.append(Message(roles[speaker], speaker, text, learned_of(found, where)))
        if own is not None:
            shown = _images(walk(found, own, mapping.images), f"{where}: '{mapping.images}'")
            _place_own(messages[-1], shown, mapping, where)
            images += shown
    return messages
