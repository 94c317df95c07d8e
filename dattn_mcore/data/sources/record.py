"""A LLaVA record, checked: `{id?, image?, conversations: [{from, value}, ...]}`.

`image` is a path below the image folder, or a list of them; `<image>` stands in a human turn
for each. Turns alternate, human first, gpt last; a gpt turn before the first is left aside. A
system turn may come first, or stand as the record's `system`. Other keys, of the record or of a
turn, must be known metadata (`metadata.py`).
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from dattn_mcore.data.sources.metadata import METADATA, is_filled, left_aside
from dattn_mcore.errors import DataError
from dattn_mcore.types import IMAGE_MARK

GREETING = "a first turn from gpt"  # how `Sample.ignored` calls one
_SPEAKERS = ("human", "gpt")
_USED = frozenset(("id", "image", "system", "conversations"))
_USED_OF_A_TURN = frozenset(("from", "value"))


@dataclass(frozen=True, slots=True)
class Sample:
    """One annotation record.

    Attributes:
        id: Annotation id (not necessarily unique in the file).
        images: Image paths relative to the image folder, in the order of their marks.
        turns: Turn texts; even ones are the human's, odd ones the answers.
        system: Text of its system turn; "" if it has none.
        ignored: Names of the metadata that training leaves aside.
    """

    id: str
    images: tuple[str, ...]
    turns: tuple[str, ...]
    system: str = ""
    ignored: tuple[str, ...] = ()


class RecordError(DataError):
    """A record that cannot be used.

    Attributes:
        id: Its id, as far as it has one; "" if not.
    """

    def __init__(self, reason: str, name: Any) -> None:
        super().__init__(reason)
        text = str(name) if isinstance(name, str | int) else ""
        self.id = text.encode("utf-8", "replace").decode()  # every message can show it

    def __reduce__(self) -> tuple[type[RecordError], tuple[str, str]]:
        """For other processes: pickle knows the message alone."""
        return type(self), (str(self), self.id)


def decode_json(raw: bytes) -> Any:
    """Decodes the bytes of one record; a byte order mark before it is dropped.

    Raises:
        DataError: What is wrong with it, without saying where it stands.
    """
    try:
        return json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise DataError(f"malformed JSON ({error.msg} at character {error.pos})") from None
    except ValueError:  # what Python says names a setting of its own
        raise DataError("malformed JSON (a number of thousands of digits)") from None
    except RecursionError:
        raise DataError("nested too deeply for a LLaVA record") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys stand once; Python would keep the last of several."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"key '{twice}' stands twice in one object")
    return found


def parse_record(record: Any, key: str, known: Collection[str] = METADATA) -> Sample:
    """Checks one decoded record.

    Args:
        record: From `decode_json`.
        key: Stands in for an `id` that it lacks.
        known: Names of metadata, from `known_metadata`.

    Raises:
        RecordError: What is wrong with it, without saying where it stands.
    """
    if not isinstance(record, dict):
        raise RecordError(f"a record must be an object, got {_kind(record)}", key)
    name = record["id"] if is_filled(record.get("id")) else key
    try:
        return _parse(record, name, known)
    except DataError as error:
        raise RecordError(str(error), name) from None


def _parse(record: dict[str, Any], name: Any, known: Collection[str]) -> Sample:
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise DataError(f"'id' must be a string, got {_kind(name)}")
    _check_text("'id'", str(name))
    ignored = left_aside(record, _USED, known)
    images = _images(record.get("image"))
    system, turns = _turns(record, known, ignored)
    marks = sum(turn.count(IMAGE_MARK) for turn in turns)
    if marks != len(images):
        raise DataError(
            f"{marks} {IMAGE_MARK} mark(s) in the conversation but {len(images)} image(s) in "
            f"'image'; there must be one mark for each image"
        )
    if any(IMAGE_MARK in turn for turn in turns[1::2]):
        raise DataError(f"{IMAGE_MARK} stands in a gpt turn; only human turns may show images")
    if not any(turn.strip() for turn in turns[1::2]):
        raise DataError("every answer is empty; there is nothing to learn from it")
    if IMAGE_MARK in system:
        raise DataError(f"{IMAGE_MARK} stands in the system turn; only human turns may show images")
    return Sample(str(name), images, turns, system, tuple(ignored))


def _images(value: Any) -> tuple[str, ...]:
    """Checks `image`: absent or null, one path, or a list of paths."""
    if value is None:
        return ()
    paths = value if isinstance(value, list) else [value]
    for path in paths:
        if not isinstance(path, str):
            raise DataError(f"'image' must be a path or a list of paths, got {_kind(path)}")
        if not path or "\0" in path:
            raise DataError(f"'image' holds the empty or unusable path {path!r}")
        _check_text("'image'", path)
        if path.startswith("/"):
            raise DataError(f"image path '{path}' is absolute; it must be relative to the folder")
        if ".." in path.split("/"):
            raise DataError(f"image path '{path}' leaves the image folder ('..' is not allowed)")
    return tuple(paths)


def _turns(
    record: dict[str, Any], known: Collection[str], ignored: list[str]
) -> tuple[str, tuple[str, ...]]:
    """Checks `system` and `conversations`: human and gpt in turn, human first, gpt last.

    A first turn from gpt is left aside, as LLaVA's `preprocess` does (its mixture has such
    records). What is left aside is added to `ignored`.

    Returns:
        The system turn, and the others.
    """
    if "conversations" not in record:
        raise DataError("key 'conversations' is missing")
    given = record["conversations"]
    if not isinstance(given, list) or not given:
        raise DataError(f"'conversations' must be a non-empty list, got {_kind(given)}")
    turns = [_turn(position, turn, known, ignored) for position, turn in enumerate(given)]
    system = record.get("system") if is_filled(record.get("system")) else ""
    if not isinstance(system, str):
        raise DataError(f"'system' must be a string, got {_kind(system)}")
    _check_text("'system'", system)
    first = 0
    if turns[0][0] == "system":
        if system and turns[0][1]:
            raise DataError("there is a 'system' key and a system turn; give one of them")
        system, first = system or turns[0][1], 1
        if len(turns) == 1:
            raise DataError("'conversations' holds a system turn and no other")
    if turns[first][0] == "gpt":
        first += 1
        ignored.append(GREETING)
    values: list[str] = []
    for position, (speaker, value) in enumerate(turns[first:], first):
        if speaker == "system":
            raise DataError(f"turn {position} is from 'system'; only the first turn can be")
        expected = _SPEAKERS[len(values) % 2]
        if speaker != expected:
            raise DataError(
                f"turn {position} is from {speaker!r} where {expected!r} is due; turns "
                "alternate, human first"
            )
        values.append(value)
    if not values:
        raise DataError("the only turn is from 'gpt'; it answers nothing")
    if len(values) % 2:
        raise DataError(f"the last of {len(values)} turns is from 'human'; an answer must follow")
    return system, tuple(values)


def _turn(position: int, turn: Any, known: Collection[str], ignored: list[str]) -> tuple[str, str]:
    """Checks one turn; returns its speaker and text."""
    if not isinstance(turn, dict):
        raise DataError(f"turn {position} must be an object, got {_kind(turn)}")
    for key in ("from", "value"):
        if key not in turn:
            raise DataError(f"turn {position}: key '{key}' is missing")
        if not isinstance(turn[key], str):
            raise DataError(f"turn {position}: '{key}' must be a string, got {_kind(turn[key])}")
    if turn["from"] not in (*_SPEAKERS, "system"):
        raise DataError(
            f"turn {position}: 'from' is {turn['from']!r}; it must be 'human', 'gpt' or 'system'"
        )
    _check_text(f"turn {position}", turn["value"])
    if len(turn) > len(_USED_OF_A_TURN):
        names = _left_aside_of(position, turn, known)
        ignored += [name for name in names if name not in ignored]
    return turn["from"], turn["value"]


def _left_aside_of(position: int, turn: dict[str, Any], known: Collection[str]) -> list[str]:
    try:
        names = left_aside(turn, _USED_OF_A_TURN, known)
    except DataError as error:
        raise DataError(f"turn {position}: {error}") from None
    return [f"conversations[].{name}" for name in names]


def _check_text(where: str, text: str) -> None:
    """Refuses half of a UTF-16 pair, of JSON: no file name, no tokenizer takes it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} holds the lone surrogate {text[error.start]!r} at character {error.start}; "
            "it is no Unicode text"
        ) from None


def _kind(value: Any) -> str:
    """Names a JSON value's type, or an emptiness, for messages."""
    if value is None:
        return "null"
    if isinstance(value, list | dict | str) and not value:
        return f"an empty {'list' if isinstance(value, list) else type(value).__name__}"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return names.get(type(value), "a number")
