"""`mapping:` of a source: where the fields of any other record stand, so that nobody writes code.

A path is keys with dots between, `[]` behind one that holds a list, and `[2]` for one entry of it:

    mapping: {images: "media.files[].path", question: "qa.q", answer: "qa.a"}
    mapping: {images: pictures, turns: "dialog[]", role: who, text: says, user: me, assistant: bot}

Every key of a record that no path reads, at any depth, must be known metadata, as in any form. Of a
list of which a path names one entry, the others are left aside, and counted.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from dattn_mcore.config.schema import MappingConfig
from dattn_mcore.data.sources.metadata import is_filled
from dattn_mcore.data.sources.record import kind
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
from dattn_mcore.data.sources.records.unmapped import left_over, tree_of
from dattn_mcore.errors import DataError

_STEP = re.compile(r"([^.\[\]]+)((?:\[\d*\])*)(?:\.|$)")
_INDEX = re.compile(r"\[(\d*)\]")


def mapped_form(mapping: MappingConfig) -> Form:
    """The form of a source's `mapping:`.

    Raises:
        DataError: It names too little, or a path is malformed.
    """
    check_mapping(mapping)
    paths = (mapping.id, mapping.images, mapping.turns, mapping.question, mapping.answer)
    tops = {_steps(path)[0] for path in (*paths, mapping.system, mapping.weight) if path}
    image_key = str(_steps(mapping.images)[0]) if mapping.images else "images"
    tree = tree_of(_read_paths(mapping))

    def read(record: Mapping[str, Any], known: Collection[str]) -> Draft:
        draft = _read(record, mapping)
        draft.ignored = left_over(record, tree, known)
        return draft

    return Form(
        name="mapping",
        used=frozenset({"id", *map(str, tops)}),
        image_key=image_key,
        image_keys=(image_key,),
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
        if path and not _steps(path):
            raise DataError(
                f"mapping: {name}: '{path}' is no path; write keys with dots between, and [] "
                "behind a list"
            )


def field_of(record: Any, path: str) -> Any:
    """What stands at a path; None where a key of it is absent. A path with [] gives a list.

    Raises:
        DataError: The path asks for a list, or an entry of one, where there is none.
    """
    return _walk(record, _steps(path), path)


def _walk(value: Any, steps: list[str | int | None], path: str) -> Any:
    for number, step in enumerate(steps):
        if value is None:
            return None
        if isinstance(step, str):
            if not isinstance(value, dict):
                raise DataError(f"'{path}': '{step}' is looked for in {kind(value)}, no object")
            value = value.get(step)
        elif not isinstance(value, list):
            raise DataError(f"'{path}': a list is due, got {kind(value)}")
        elif step is None:
            found = [_walk(one, steps[number + 1 :], path) for one in value]
            nested = None in steps[number + 1 :]
            return [one for part in found for one in part or []] if nested else found
        elif step >= len(value):
            raise DataError(f"'{path}': the list has {len(value)} entries and no [{step}]")
        else:
            value = value[step]
    return value


def _steps(path: str) -> list[str | int | None]:
    """Keys, entries, and None for every entry of a list; empty where a path is malformed."""
    steps: list[str | int | None] = []
    place = 0
    while place < len(path):
        match = _STEP.match(path, place)
        if match is None or (match[0].endswith(".") and match.end() == len(path)):
            return []
        steps.append(match[1])
        steps += [int(index) if index else None for index in _INDEX.findall(match[2])]
        place = match.end()
    return steps


def _read_paths(mapping: MappingConfig) -> list[list[str | int | None]]:
    """All that is read of a record, the keys of its turns included."""
    whole = (mapping.id, mapping.images, mapping.question, mapping.answer, mapping.system)
    paths = [_steps(path) for path in (*whole, mapping.weight) if path]
    if mapping.turns:
        turn = _steps(mapping.turns)
        if None not in turn:
            turn = [*turn, None]  # the path of the list, not of its entries
        paths += [turn + _steps(path) for path in (mapping.role, mapping.text, "loss")]
    return paths


def _read(record: Mapping[str, Any], mapping: MappingConfig) -> Draft:
    words = Words("turn", f"'{mapping.turns or mapping.question}'", images=f"'{mapping.images}'")
    images = []
    if mapping.images and is_filled(found := field_of(record, mapping.images)):
        values = found if isinstance(found, list) else [found]
        images = [image_of(one, words.images) for one in values]
    if mapping.turns:
        words = Words("turn", words.turns, mapping.user, mapping.assistant, words.images)
        messages = _messages(record, mapping)
    else:
        words = Words("text", words.turns, mapping.question, mapping.answer, words.images)
        messages = [
            Message("user", mapping.question, _text(record, mapping.question)),
            Message("answer", mapping.answer, _text(record, mapping.answer)),
        ]
    place_images(messages, images)
    system = field_of(record, mapping.system) if mapping.system else None
    draft = Draft(messages=messages, images=images, words=words)
    if mapping.weight:
        draft.weight = field_of(record, mapping.weight)
    draft.system = "" if system is None else text_of(system, f"'{mapping.system}'")
    return draft


def _text(record: Mapping[str, Any], path: str) -> str:
    return text_of(field_of(record, path), f"'{path}'")


def _messages(record: Mapping[str, Any], mapping: MappingConfig) -> list[Message]:
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
    return messages
