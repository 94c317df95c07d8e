"""The rules that all forms share: from a draft to a sample, or the one line of what is wrong."""

from __future__ import annotations

import re
from typing import Any

from dattn_mcore.data.sources.record import GREETING, Sample, ToolUse, check_text, kind
from dattn_mcore.data.sources.records.draft import Draft, Message, Words
from dattn_mcore.data.sources.records.images import below
from dattn_mcore.errors import DataError
from dattn_mcore.types import IMAGE_MARK

_PAIR = ["user", "answer"]
_UNREAD = {"<video>": "video", "<audio>": "sound"}  # as Qwen2.5-VL, InternVL, ms-swift write them
_FOREIGN = re.compile(r"<img>[^<>]{1,4096}</img>")  # as Qwen-VL's files name images in texts


def to_sample(draft: Draft, name: str, folder: str) -> Sample:
    """Checks what a form read.

    Args:
        draft: From the form.
        name: Its id.
        folder: Folder of the images, "" where it is not known.

    Raises:
        DataError: What is wrong, without saying where it stands.
    """
    weight = _weight(draft.weight)
    if draft.document is not None:
        return _document(draft, name, folder, weight)
    system, messages = _system(draft)
    turns, learned, tool_use = _turns(draft, messages)
    texts = turns
    if tool_use is not None:
        texts = (*turns, *(text for turn in tool_use.responses for text in turn))
    _check_media((system, *texts))
    _check_marks(draft, system, texts, turns[1::2])
    _check_answers(turns[1::2], learned, tool_use)
    return Sample(
        id=name,
        images=_images(draft, folder),
        turns=turns,
        system=system,
        ignored=tuple(draft.ignored),
        learned=learned if False in learned else (),
        weight=weight,
        tool_use=tool_use,
    )


def _check_answers(
    answers: tuple[str, ...], learned: tuple[bool, ...], tool_use: ToolUse | None
) -> None:
    """Refuses a sample of which nothing is learned."""
    said = [bool(text.strip()) for text in answers]
    if tool_use is not None:
        said = [full or bool(calls) for full, calls in zip(said, tool_use.calls, strict=True)]
    if True not in said:
        raise DataError("every answer is empty; there is nothing to learn from it")
    if False in learned and not any(
        full and counts for full, counts in zip(said, learned, strict=True)
    ):
        raise DataError("'loss' is false for every answer; there is nothing to learn from it")


def _images(draft: Draft, folder: str) -> tuple[Any, ...]:
    return tuple(below(one, folder) if isinstance(one, str) else one for one in draft.images)


def _document(draft: Draft, name: str, folder: str, weight: float) -> Sample:
    text = draft.document or ""
    _check_media((text,))
    marks = text.count(IMAGE_MARK)
    if marks != len(draft.images):
        raise DataError(
            f"{marks} {IMAGE_MARK} mark(s) in the text but {len(draft.images)} image(s) in "
            f"{draft.words.images}; a text of an interleaved document holds no marks of its own"
        )
    if not text.replace(IMAGE_MARK, "").strip():
        raise DataError("the document holds no text; there is nothing to learn from it")
    return Sample(
        id=name,
        images=_images(draft, folder),
        turns=(text,),
        ignored=tuple(draft.ignored),
        weight=weight,
        document=True,
    )


def _weight(value: Any) -> float:
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"'weight' must be a number above 0, got {kind(value)}")
    if not 0 < value < 1e6:
        raise DataError(f"'weight' is {value}; it must be above 0 and below 1,000,000")
    return float(value)


def _system(draft: Draft) -> tuple[str, list[Message]]:
    """The system text, and the messages behind it and behind a greeting."""
    messages, words, system = draft.messages, draft.words, draft.system
    check_text("'system'", system)
    first = 0
    if messages[0].role == "system":
        if system and messages[0].text:
            raise DataError(f"there is a 'system' key and a system {words.turn}; give one of them")
        system, first = system or messages[0].text, 1
        if len(messages) == 1:
            raise DataError(f"{words.turns} holds a system {words.turn} and no other")
    if words.greets and messages[first].role == "answer":
        first += 1
        draft.ignored.append(GREETING)
    return system, messages[first:]


def _turns(
    draft: Draft, messages: list[Message]
) -> tuple[tuple[str, ...], tuple[bool, ...], ToolUse | None]:
    """Questions and answers in turn; neighbouring messages from tools are one turn."""
    roles = [message.role for message in messages]
    answered = messages[1::2]
    plain = roles == _PAIR * (len(roles) // 2) and bool(roles) and not draft.tools
    if plain and not any(message.calls for message in answered):  # nearly all: the quick way
        texts = tuple([message.text for message in messages])
        return texts, tuple([message.learned for message in answered]), None
    return _checked_turns(draft, messages)


def _checked_turns(
    draft: Draft, messages: list[Message]
) -> tuple[tuple[str, ...], tuple[bool, ...], ToolUse | None]:
    """Likewise, turn by turn."""
    words, first = draft.words, len(draft.messages) - len(messages)
    texts: list[str] = []
    learned: list[bool] = []
    calls: list[tuple[str, ...]] = []
    responses: list[tuple[str, ...]] = []
    uses_tools = bool(draft.tools)
    for position, message in enumerate(messages, first):
        asked = len(texts) % 2 == 0
        if message.role == "tool":
            uses_tools = True
            if not asked and responses[-1]:
                responses[-1] += (message.text,)
                continue
            if not asked or not calls or not calls[-1]:
                raise DataError(
                    f"{words.turn} {position} is from {message.speaker!r}, and no call of a tool "
                    "stands before it"
                )
            texts.append("")
            responses.append((message.text,))
            continue
        if message.role == "system":
            raise DataError(
                f"{words.turn} {position} is from {message.speaker!r}; only the first {words.turn} "
                "can be"
            )
        if (message.role == "user") != asked:
            expected = words.user if asked else words.answer
            raise DataError(
                f"{words.turn} {position} is from {message.speaker!r} where {expected!r} is due; "
                f"{words.turn}s alternate, {words.user} first"
            )
        texts.append(message.text)
        if asked:
            if calls and calls[-1]:
                raise DataError(
                    f"{words.turn} {position} is from {message.speaker!r}, and the call of a tool "
                    "before it has no response"
                )
            responses.append(())
        else:
            uses_tools = uses_tools or bool(message.calls)
            learned.append(message.learned)
            calls.append(message.calls)
    _check_ends(words, texts)
    tool_use = ToolUse(draft.tools, tuple(calls), tuple(responses)) if uses_tools else None
    return tuple(texts), tuple(learned), tool_use


def _check_ends(words: Words, texts: list[str]) -> None:
    if not texts:
        raise DataError(f"the only {words.turn} is from {words.answer!r}; it answers nothing")
    if len(texts) % 2:
        raise DataError(
            f"the last of {len(texts)} {words.turn}s is from {words.user!r}; an answer must follow"
        )


def _check_media(texts: tuple[str, ...]) -> None:
    """Refuses the mark of a video or a sound: it would be learned as if it were words."""
    whole = "\n".join(texts)
    for mark, medium in _UNREAD.items():
        if mark in whole:
            raise DataError(
                f"a text holds the mark {mark}, and {medium} is not read yet; only text and "
                "images are"
            )


def _check_marks(
    draft: Draft, system: str, texts: tuple[str, ...], answers: tuple[str, ...]
) -> None:
    words, count = draft.words, len(draft.images)
    whole = "\n".join(texts)
    marks = whole.count(IMAGE_MARK)
    if marks != count:
        raise DataError(
            f"{marks} {IMAGE_MARK} mark(s) in the conversation but {count} image(s) in "
            f"{words.images}; there must be one mark for each image"
        )
    if marks and any(IMAGE_MARK in answer for answer in answers):
        raise DataError(
            f"{IMAGE_MARK} stands in a {words.answer} {words.turn}; only {words.user} "
            f"{words.turn}s may show images"
        )
    if IMAGE_MARK in system:
        raise DataError(
            f"{IMAGE_MARK} stands in the system {words.turn}; only {words.user} {words.turn}s may "
            "show images"
        )
    if "<img>" in whole and (found := _FOREIGN.search(whole)):
        raise DataError(
            f"a text names an image as Qwen-VL does, {found[0][:80]!r}; give the path in "
            f"{words.images} and put {IMAGE_MARK} into the text"
        )
