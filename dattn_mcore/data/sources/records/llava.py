"""LLaVA: `{id?, image?, conversations: [{from, value}, ...]}`, and its tool-using kin of ShareGPT.

`image` or `images` is a path or a list of them; `<image>` stands in a human turn for each. Turns
alternate, human (or user) first, gpt (or assistant) last; a gpt turn before the first is left
aside. A system turn may come first, or stand as the record's `system`. The same form is that of
LLaVA-NeXT-Interleave, InternVL, and Qwen2.5-VL's fine-tuning.

Instead of `conversations` there may be `branches`, a list of such lists (see `branches`).

`sharegpt` is LLaMA-Factory's: it adds `tools` and turns from `function_call` and `observation`.
Sources: LLaVA's `docs/Finetune_Custom_Data.md`, LLaMA-Factory's `data/README.md`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from dattn_mcore.data.sources.metadata import is_filled
from dattn_mcore.data.sources.record import check_text, kind
from dattn_mcore.data.sources.records.branches import turns_of_branches
from dattn_mcore.data.sources.records.draft import (
    Draft,
    Form,
    Message,
    Role,
    Words,
    is_list_of,
    learned_of,
    optional_text,
    turn_metadata,
)
from dattn_mcore.data.sources.records.images import images_of
from dattn_mcore.data.sources.records.tool_calls import calls_of_text, tools_of
from dattn_mcore.errors import DataError

_ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "answer",
    "assistant": "answer",
    "system": "system",
}
_TOOL_ROLES = ("function_call", "observation", "tool")
_USED_OF_A_TURN = frozenset(("from", "value", "loss"))
_WORDS = Words(greets=True)
_WORDS_OF_SEVERAL = Words(greets=True, images="'images'")


def _read(record: Mapping[str, Any], known: Collection[str]) -> Draft:
    return _draft(record, known, with_tools=False)


def _read_sharegpt(record: Mapping[str, Any], known: Collection[str]) -> Draft:
    return _draft(record, known, with_tools=True)


def _draft(record: Mapping[str, Any], known: Collection[str], with_tools: bool) -> Draft:
    images, field = images_of(record, "image", "images")
    if "conversations" not in record:
        raise DataError("key 'conversations' is missing")
    given = record["conversations"]
    if not isinstance(given, list) or not given:
        raise DataError(f"'conversations' must be a non-empty list, got {kind(given)}")
    ignored: list[str] = []
    return Draft(
        messages=[
            _message(position, turn, known, ignored, with_tools)
            for position, turn in enumerate(given)
        ],
        images=images,
        words=_WORDS if field == "'image'" else _WORDS_OF_SEVERAL,
        system=optional_text(record, "system"),
        tools=tools_of(record.get("tools")) if with_tools else (),
        ignored=ignored,
    )


def _message(
    position: int, turn: Any, known: Collection[str], ignored: list[str], with_tools: bool
) -> Message:
    """Checks one turn."""
    if type(turn) is dict and len(turn) == 2:  # what nearly all are: the quick way
        speaker, text = turn.get("from"), turn.get("value")
        if type(speaker) is str and type(text) is str and text.isascii() and speaker in _ROLES:
            return Message(_ROLES[speaker], speaker, text)
    if not isinstance(turn, dict):
        raise DataError(f"turn {position} must be an object, got {kind(turn)}")
    for key in ("from", "value"):
        if key not in turn:
            raise DataError(f"turn {position}: key '{key}' is missing")
        if not isinstance(turn[key], str):
            raise DataError(f"turn {position}: '{key}' must be a string, got {kind(turn[key])}")
    speaker, text = turn["from"], turn["value"]
    learned = True
    if len(turn) > 2:
        where = f"turn {position}"
        turn_metadata(turn, _USED_OF_A_TURN, (where, "conversations"), known, ignored)
        learned = learned_of(turn, where)
    check_text(f"turn {position}", text)
    role = _ROLES.get(speaker)
    if role is not None:
        return Message(role, speaker, text, learned)
    if with_tools and speaker in _TOOL_ROLES:
        if speaker == "function_call":
            calls = calls_of_text(text, f"turn {position}")
            return Message("answer", speaker, "", learned, calls)
        return Message("tool", speaker, text)
    more = "; turns of tools belong to format: sharegpt" if speaker in _TOOL_ROLES else ""
    raise DataError(
        f"turn {position}: 'from' is {speaker!r}; it must be 'human', 'gpt' or 'system'{more}"
    )


def _uses_tools(record: Mapping[str, Any]) -> bool:
    return is_filled(record.get("tools")) or any(
        isinstance(turn, dict) and turn.get("from") in _TOOL_ROLES
        for turns in _all_turns(record)
        for turn in turns
    )


def _is_conversation(record: Mapping[str, Any]) -> bool:
    return any(is_list_of(turns, "from", "value") for turns in _all_turns(record))


def _all_turns(record: Mapping[str, Any]) -> list[list[Any]]:
    """Lists of turns: the conversation, or its branches."""
    if isinstance(record.get("conversations"), list):
        return [record["conversations"]]
    return [turns for turns in turns_of_branches(record) if isinstance(turns, list)]


_KEYS = frozenset(("id", "image", "images", "system", "conversations", "branches", "weight"))
LLAVA = Form(
    name="llava",
    used=_KEYS,
    image_key="image",
    image_keys=("image", "images"),
    matches=lambda record: _is_conversation(record) and not _uses_tools(record),
    read=_read,
    branch_turns="conversations",
)
SHAREGPT = Form(
    name="sharegpt",
    used=_KEYS | {"tools"},
    image_key="images",
    image_keys=("image", "images"),
    matches=lambda record: _is_conversation(record) and _uses_tools(record),
    read=_read_sharegpt,
    branch_turns="conversations",
)
