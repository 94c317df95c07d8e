"""The rules that all forms share: from a draft to a sample, or the one line of what is wrong."""

from __future__ import annotations

from typing import Any

from dattn_mcore.data.sources.record import GREETING, Sample, ToolUse, check_text, kind
from dattn_mcore.data.sources.records.draft import Draft, Message
from dattn_mcore.data.sources.records.images import below
from dattn_mcore.data.sources.records.marks import check_document, check_marks, check_media
from dattn_mcore.data.sources.records.turns import turns_of
from dattn_mcore.errors import DataError
from dattn_mcore.types import IMAGE_MARK


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
    turns, learned, tool_use = turns_of(draft, messages)
    texts = turns
    if tool_use is not None:
        texts = (*turns, *(text for turn in tool_use.responses for text in turn))
    check_media((system, *texts))
    check_marks(draft, system, texts, turns[1::2])
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
    check_document(draft)
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
