"""`{messages: [{role, content}, ...], images?}`: Hugging Face, OpenAI, TRL, LLaMA-Factory.

`content` is a text, with an `<image>` for each of `images`, or a list of typed parts:
`{type: text, text}`, `{type: image}` (the next of `images`, or its own `image`, `path`, `url` or
`base64`) and OpenAI's `{type: image_url, image_url: {url}}`. Qwen-VL's parts without a type are
read likewise. Where no text has a mark, the images stand in front of the first question, as TRL and
ms-swift put them. TRL's `prompt` and `completion` are read too: only the completion has loss; a
text `prompt` beside `messages` is a copy (see `copies`). MiniCPM-V names images by their marks.
Instead of `messages` there may be `branches`, a list of such lists (see `branches`).

`swift` is ms-swift's: it adds `query`, `response`, `history`, and turns from `tool_call`, which are
one answer with the assistant's turns and calls next to them.
Sources: OpenAI's chat format, TRL's `docs/source/dataset_formats.md`, ms-swift's
`docs/source_en/Customization/Custom-dataset.md` and `docs/source_en/Instruction/Agent-support.md`,
Qwen's `messages` of `qwen_vl_utils`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from dattn_mcore.data.sources.metadata import is_filled
from dattn_mcore.data.sources.record import Inside, kind
from dattn_mcore.data.sources.records.branches import KEY, turns_of_branches
from dattn_mcore.data.sources.records.content import content_of
from dattn_mcore.data.sources.records.copies import copied_prompt
from dattn_mcore.data.sources.records.draft import (
    Draft,
    Form,
    Message,
    Role,
    Words,
    is_list_of,
    learned_of,
    list_of,
    object_of,
    optional_text,
    text_of,
    turn_metadata,
)
from dattn_mcore.data.sources.records.images import image_of, images_of
from dattn_mcore.data.sources.records.marks import are_named, place_images, place_named
from dattn_mcore.data.sources.records.tool_calls import call_of, calls_of_text, tools_of
from dattn_mcore.errors import DataError

_ROLES: dict[str, Role] = {
    "user": "user",
    "assistant": "answer",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
}
_SWIFT_ROLES = ("tool_call", "tool_response")
_USED = frozenset(("role", "content", "loss", "weight", "tool_calls"))
_USED_OF_A_TOOL = _USED | {"name", "tool_call_id"}
_KEYS = frozenset(
    ("id", "messages", "conversations", "images", "image", "system", "tools", "weight")
)
_PAIR = frozenset(("prompt", "completion"))
_WAYS = (("messages",), ("conversations",), ("prompt", "completion"))
_SWIFT_KEYS = frozenset(("query", "response", "history"))
_REJECTED = frozenset(("rejected_response", "rejected_messages"))


def _read(record: Mapping[str, Any], known: Collection[str]) -> Draft:
    return _draft(record, known, swift=False)


def _read_swift(record: Mapping[str, Any], known: Collection[str]) -> Draft:
    if is_filled(record.get("objects")):
        raise DataError(
            "'objects' holds boxes of ms-swift's grounding, which are not read; only text and "
            "images are"
        )
    return _draft(record, known, swift=True)


def _draft(record: Mapping[str, Any], known: Collection[str], swift: bool) -> Draft:
    named = record["image"] if are_named(record.get("image")) else {}
    rest = {**record, "image": None} if named else record
    images, field = images_of(rest, "images", "image")
    if named and images:
        raise DataError("'images' and 'image' both hold images; give one of them")
    inline: list[str | Inside | None] = []
    ignored: list[str] = []
    key, given = _turns_of(record, swift)
    messages = [
        _message(position, turn, known, ignored, inline, swift)
        for position, turn in enumerate(given)
    ]
    words = Words(
        turn="message",
        turns=key,
        user="user",
        answer="assistant",
        images=field,
        joins=any(message.speaker == "tool_call" for message in messages),
    )
    if is_filled(record.get("prompt")):
        for message in messages[: len(record["prompt"])]:
            message.learned = False
    if named:
        if inline:
            raise DataError("'image' names images by their marks and a part is one; use one way")
        marked = {mark: image_of(one, f"'image'{[mark]}") for mark, one in named.items()}
        images = place_named(messages, marked, "'image'")
    elif inline:
        images = _filled_in(inline, images, field)
    else:
        place_images(messages, images)
    return Draft(
        messages=messages,
        images=images,
        words=words,
        system=optional_text(record, "system"),
        tools=tools_of(record.get("tools")),
        ignored=ignored,
    )


def _turns_of(record: Mapping[str, Any], swift: bool) -> tuple[str, list[Any]]:
    """The quoted key of the turns, and the turns."""
    for key in ("messages", "conversations"):
        if is_filled(record.get(key)):
            return f"'{key}'", list_of(record[key], f"'{key}'")
    if any(is_filled(record.get(key)) for key in _PAIR):
        prompt = list_of(record.get("prompt"), "'prompt'")
        return "'prompt'", [*prompt, *list_of(record.get("completion"), "'completion'")]
    if swift:
        return "'query' and 'response'", _pairs(record)
    return "'messages'", list_of(record.get("messages"), "'messages'")


def _pairs(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """ms-swift's former form: earlier pairs in `history`, then `query` and `response`."""
    turns: list[dict[str, Any]] = []
    for number, pair in enumerate(record.get("history") or []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"'history'[{number}] must be a list of a question and an answer")
        for role, said in zip(("user", "assistant"), pair, strict=True):
            turns.append({"role": role, "content": text_of(said, f"'history'[{number}]")})
    for role, name in (("user", "query"), ("assistant", "response")):
        turns.append({"role": role, "content": text_of(record.get(name), f"'{name}'")})
    return turns


def _filled_in(
    inline: list[str | Inside | None], beside: list[str | Inside], field: str
) -> list[str | Inside]:
    """Images of typed parts; those that name none are the next ones of the record."""
    open_places = sum(image is None for image in inline)
    if open_places != len(beside):
        raise DataError(
            f"{open_places} image part(s) without an image of their own but {len(beside)} "
            f"image(s) in {field}; there must be one part for each image"
        )
    left = iter(beside)
    return [next(left) if image is None else image for image in inline]


def _message(
    position: int,
    turn: Any,
    known: Collection[str],
    ignored: list[str],
    inline: list[str | Inside | None],
    swift: bool,
) -> Message:
    where = f"message {position}"
    found = object_of(turn, where)
    for key in ("role", "content"):
        if key not in found:
            if key == "content" and is_filled(found.get("tool_calls")):
                continue
            raise DataError(f"{where}: key '{key}' is missing")
    speaker = text_of(found["role"], f"{where}: 'role'")
    role = _ROLES.get(speaker)
    if swift and speaker in _SWIFT_ROLES:
        role = "answer" if speaker == "tool_call" else "tool"
    if role is None:
        more = "; turns of ms-swift's tools belong to format: swift"
        raise DataError(
            f"{where}: 'role' is {speaker!r}; it must be 'user', 'assistant', 'system' or 'tool'"
            f"{more if speaker in _SWIFT_ROLES else ''}"
        )
    if len(found) > 2:
        used = _USED_OF_A_TOOL if role == "tool" else _USED
        turn_metadata(found, used, (where, "messages"), known, ignored)
    calls = found.get("tool_calls")
    content = found.get("content")
    # Of a message that only calls tools.
    text = "" if content is None and is_filled(calls) else content_of(content, where, inline)
    if not is_filled(calls):
        calls = []
    elif role != "answer" or not isinstance(calls, list):
        raise DataError(f"{where}: 'tool_calls' must be a list, and stand in an assistant message")
    said = tuple(call_of(call, where) for call in calls)
    if speaker == "tool_call":
        if said:
            raise DataError(f"{where}: 'tool_calls' stands beside the call that 'content' holds")
        text, said = "", calls_of_text(text, where)
    return Message(role, speaker, text, _learned(found, where), said)


def _learned(turn: Mapping[str, Any], where: str) -> bool:
    """Whether an answer has loss: `loss`, or OpenAI's `weight` of 0 or 1."""
    weight = turn.get("weight")
    if weight is None:
        return learned_of(turn, where)
    if turn.get("loss") is not None or weight not in (0, 1):
        raise DataError(f"{where}: 'weight' is {kind(weight)} that is not 0 or 1, or beside 'loss'")
    return bool(weight)


def _is_messages(record: Mapping[str, Any]) -> bool:
    if is_list_of(record.get("prompt"), "role") and is_list_of(record.get("completion"), "role"):
        return True
    given = [record.get(key) for key in ("messages", "conversations")]
    return any(is_list_of(turns, "role") for turns in (*given, *turns_of_branches(record)))


def _is_swift(record: Mapping[str, Any]) -> bool:
    if isinstance(record.get("query"), str) and isinstance(record.get("response"), str):
        return True
    return is_list_of(record.get("messages"), "role") and (
        any(is_filled(record.get(key)) for key in (*_REJECTED, "objects"))
        or any(
            isinstance(turn, dict) and turn.get("role") in _SWIFT_ROLES
            for turn in record["messages"]
        )
    )


MESSAGES = Form(
    name="messages",
    used=_KEYS | _PAIR | {KEY},
    image_key="images",
    image_keys=("images", "image"),
    ways=_WAYS,
    matches=lambda record: _is_messages(record) and not _is_swift(record),
    read=_read,
    copied=copied_prompt,
    branch_turns="messages",
)
SWIFT = Form(
    name="swift",
    used=_KEYS | _PAIR | _SWIFT_KEYS | {"objects"},
    image_key="images",
    image_keys=("images", "image"),
    ways=(*_WAYS, ("query", "response", "history")),
    matches=_is_swift,
    read=_read_swift,
    copied=copied_prompt,
    metadata=_REJECTED,
)
