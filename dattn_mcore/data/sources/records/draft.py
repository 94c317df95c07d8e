"""What a form's module makes of a record, before the rules that all forms share."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dattn_mcore.data.sources.metadata import is_filled, left_aside
from dattn_mcore.data.sources.record import Inside, check_text, kind
from dattn_mcore.errors import DataError

Role = Literal["system", "user", "answer", "tool"]


@dataclass(slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: Who speaks.
        speaker: How the record calls the role.
        text: What is said, a mark for each image.
        learned: Of an answer: whether it has loss.
        calls: Of an answer: tools it calls, as JSON texts.
    """

    role: Role
    speaker: str
    text: str
    learned: bool = True
    calls: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Words:
    """How a form calls things, in messages.

    Attributes:
        turn: One turn.
        turns: The key that holds them, quoted.
        user: Who asks.
        answer: Who answers.
        images: The key of the images, quoted.
        greets: Whether a first answer, before any question, is left aside, as LLaVA does.
        joins: Whether neighbouring answers are one, as ms-swift's turns of tools are.
    """

    turn: str = "turn"
    turns: str = "'conversations'"
    user: str = "human"
    answer: str = "gpt"
    images: str = "'image'"
    greets: bool = False
    joins: bool = False


@dataclass(slots=True)
class Draft:
    """A record as its form reads it.

    Attributes:
        messages: Its turns; empty of a document.
        images: Its images, in the order of their marks.
        words: For messages about it.
        system: Text of the record's own key for a system turn.
        tools: Description of each tool, as JSON texts.
        document: Text of a document, None of a conversation.
        ignored: Names of what is left aside, beside the record's own metadata.
        weight: What the loss of its tokens counts; None: 1.
    """

    messages: list[Message]
    images: list[str | Inside]
    words: Words
    system: str = ""
    tools: tuple[str, ...] = ()
    document: str | None = None
    ignored: list[str] = field(default_factory=list)
    weight: Any = None


@dataclass(frozen=True, slots=True)
class Form:
    """A form of record.

    Attributes:
        name: `format:` of a source.
        used: Keys of a record that it reads.
        image_key: Under which a container puts images that lie beside the record (tar, parquet).
        matches: Whether a record looks like one of this form.
        read: Reads a record; the second argument is the known metadata. Raises DataError: what
            is wrong with the record, without saying where it stands.
        image_keys: Keys of a record that can name its images.
        ways: Groups of keys that write a sample in different ways; a record has keys of one.
        metadata: Keys of this form's records that training leaves aside.
        id_of: Finds a record's id.
        copied: Finds keys that hold a copy of what is read; they are left aside. Raises DataError
            where such a key holds something else.
        branch_turns: The key of turns that `branches` may stand for; "": it may not.
    """

    name: str
    used: frozenset[str]
    image_key: str
    matches: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Mapping[str, Any], Collection[str]], Draft]
    image_keys: tuple[str, ...]
    ways: tuple[tuple[str, ...], ...] = ()
    metadata: frozenset[str] = frozenset()
    id_of: Callable[[Mapping[str, Any]], Any] = lambda record: record.get("id")
    copied: Callable[[Mapping[str, Any]], list[str]] = lambda record: []
    branch_turns: str = ""


def text_of(value: Any, where: str) -> str:
    """A text of a record.

    Args:
        value: What stands there.
        where: How messages call the place.

    Raises:
        DataError: It is no text.
    """
    if not isinstance(value, str):
        raise DataError(f"{where} must be a string, got {kind(value)}")
    check_text(where, value)
    return value


def optional_text(record: Mapping[str, Any], key: str) -> str:
    """Text of a key that may be absent or null.

    Raises:
        DataError: It holds something else than a text.
    """
    value = record.get(key)
    return "" if value is None else text_of(value, f"'{key}'")


def list_of(value: Any, where: str) -> list[Any]:
    """A list of a record that must hold something.

    Args:
        value: What stands there.
        where: How messages call the place.

    Raises:
        DataError: It is no list, or an empty one.
    """
    if not isinstance(value, list) or not value:
        raise DataError(f"{where} must be a non-empty list, got {kind(value)}")
    return value


def object_of(value: Any, where: str) -> dict[str, Any]:
    """An object of a record.

    Args:
        value: What stands there.
        where: How messages call the place.

    Raises:
        DataError: It is no object.
    """
    if not isinstance(value, dict):
        raise DataError(f"{where} must be an object, got {kind(value)}")
    return value


def learned_of(turn: Mapping[str, Any], where: str) -> bool:
    """Whether an answer has loss: its `loss`, true where it has none.

    Args:
        turn: The answer's turn.
        where: How messages call it.

    Raises:
        DataError: `loss` is neither true nor false.
    """
    value = turn.get("loss")
    if value is None:
        return True
    if value in (0, 1):  # booleans too
        return bool(value)
    raise DataError(f"{where}: 'loss' must be true or false, got {kind(value)}")


def check_one_way(record: Mapping[str, Any], ways: tuple[tuple[str, ...], ...]) -> None:
    """Refuses a record that is written in two ways: one of them would be dropped.

    Args:
        record: The record.
        ways: From `Form.ways`.

    Raises:
        DataError: Names a key of each way.
    """
    held = [[key for key in way if is_filled(record.get(key))] for way in ways]
    first = [keys[0] for keys in held if keys]
    if len(first) > 1:
        raise DataError(
            f"'{first[0]}' and '{first[1]}' are two ways to write a sample; give one of them"
        )


def turn_metadata(
    turn: Mapping[str, Any],
    used: Collection[str],
    where: tuple[str, str],
    known: Collection[str],
    ignored: list[str],
) -> None:
    """Adds a turn's metadata to what is left aside.

    Args:
        turn: The turn.
        used: Keys of it that are read.
        where: How messages call the turn, and the key of the turns.
        known: Names of metadata.
        ignored: Gets the names that it does not have.

    Raises:
        DataError: A key is neither used nor known.
    """
    try:
        names = left_aside(turn, used, known)
    except DataError as error:
        raise DataError(f"{where[0]}: {error}") from None
    for name in names:
        full = f"{where[1]}[].{name}"
        if full not in ignored:
            ignored.append(full)


def is_list_of(value: Any, *keys: str) -> bool:
    """Whether a value is a list whose first element is an object that has some keys."""
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], dict)
        and all(value[0].get(key) is not None for key in keys)
    )
