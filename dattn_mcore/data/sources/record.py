"""The one sample type that every form of record becomes, and what reading any record needs.

`records/` has a module for each form; `records/forms.py` chooses among them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from dattn_mcore.errors import DataError

GREETING = "a first turn from gpt"  # how `Sample.ignored` calls one


@dataclass(frozen=True, slots=True)
class Inside:
    """An image whose bytes lie inside its record.

    Attributes:
        name: How messages call it.
        data: Its bytes, or their base64 text; in a table the number of its cell in the row.
    """

    name: str
    data: bytes | str | int


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Tools of a conversation, as JSON texts.

    Attributes:
        tools: Description of each tool.
        calls: Calls of each answer, `{"name": ..., "arguments": {...}}`; mostly none.
        responses: What tools said, for each turn before an answer; none: the user speaks.
    """

    tools: tuple[str, ...]
    calls: tuple[tuple[str, ...], ...]
    responses: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One annotation record.

    Attributes:
        id: Annotation id (not necessarily unique in the file).
        images: In the order of their marks: paths relative to the image folder, or what lies
            inside the record.
        turns: Turn texts; even ones are the human's, odd ones the answers. Of a document: its text.
        system: Text of its system turn; "" if it has none.
        ignored: Names of the metadata that training leaves aside.
        learned: Whether each answer has loss; empty: all have.
        weight: What the loss of its tokens counts, above 0.
        tool_use: Its tools, calls and responses; None: it has none.
        document: Whether it is one text without turns (interleaved), learned as a whole.
        branches: Conversations about its images that do not see each other, at least two; each
            with turns and what belongs to them, the images and `ignored` stand here alone. Empty:
            it is one text.
    """

    id: str
    images: tuple[str | Inside, ...]
    turns: tuple[str, ...]
    system: str = ""
    ignored: tuple[str, ...] = ()
    learned: tuple[bool, ...] = ()
    weight: float = 1.0
    tool_use: ToolUse | None = None
    document: bool = False
    branches: tuple[Sample, ...] = ()


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
        raise DataError("nested too deeply for a record") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys stand once; Python would keep the last of several."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"key '{twice}' stands twice in one object")
    return found


def check_text(where: str, text: str) -> None:
    """Refuses half of a UTF-16 pair, of JSON: no file name, no tokenizer takes it."""
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} holds the lone surrogate {text[error.start]!r} at character {error.start}; "
            "it is no Unicode text"
        ) from None


def kind(value: Any) -> str:
    """Names a JSON value's type, or an emptiness, for messages."""
    if value is None:
        return "null"
    if isinstance(value, list | dict | str) and not value:
        return f"an empty {'list' if isinstance(value, list) else type(value).__name__}"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", bytes: "bytes"}
    return names.get(type(value), "a number")
