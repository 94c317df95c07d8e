"""Turns of a conversation in order: questions and answers, calls of tools and their responses."""

from __future__ import annotations

from dattn_mcore.data.sources.record import ToolUse
from dattn_mcore.data.sources.records.draft import Draft, Message, Words
from dattn_mcore.errors import DataError

_PAIR = ["user", "answer"]


def turns_of(
    draft: Draft, messages: list[Message]
) -> tuple[tuple[str, ...], tuple[bool, ...], ToolUse | None]:
    """Questions and answers in turn; neighbouring messages from tools are one turn.

    Args:
        draft: From the form.
        messages: Those of its messages that are no system turn and no greeting.

    Returns:
        The texts of the turns, whether each answer has loss, and the use of tools.

    Raises:
        DataError: The turns do not alternate, or a call of a tool and its response do not meet.
    """
    roles = [message.role for message in messages]
    answered = messages[1::2]
    plain = roles == _PAIR * (len(roles) // 2) and bool(roles) and not draft.tools
    if plain and not any(message.calls for message in answered):  # nearly all: the quick way
        texts = tuple([message.text for message in messages])
        return texts, tuple([message.learned for message in answered]), None
    return _checked(draft, messages)


def _checked(
    draft: Draft, messages: list[Message]
) -> tuple[tuple[str, ...], tuple[bool, ...], ToolUse | None]:
    """Likewise, turn by turn."""
    words, first = draft.words, len(draft.messages) - len(messages)
    texts: list[str] = []
    learned: list[bool] = []
    calls: list[tuple[str, ...]] = []
    responses: list[tuple[str, ...]] = []
    uses_tools = bool(draft.tools)
    before: Message | None = None
    for position, message in enumerate(messages, first):
        asked = len(texts) % 2 == 0
        if message.role == "tool":
            uses_tools = True
            if not asked and responses[-1]:
                responses[-1] += (message.text,)
            elif asked and calls and calls[-1]:
                texts.append("")
                responses.append((message.text,))
            else:
                raise DataError(
                    f"{words.turn} {position} is from {message.speaker!r}, and no call of a tool "
                    "stands before it"
                )
        elif message.role == "system":
            raise DataError(
                f"{words.turn} {position} is from {message.speaker!r}; only the first {words.turn} "
                "can be"
            )
        elif words.joins and message.role == "answer" and before and before.role == "answer":
            _check_joined(words, position, before, message)
            texts[-1] += message.text
            calls[-1] += message.calls
            uses_tools = uses_tools or bool(message.calls)
        elif (message.role == "user") != asked:
            expected = words.user if asked else words.answer
            raise DataError(
                f"{words.turn} {position} is from {message.speaker!r} where {expected!r} is due; "
                f"{words.turn}s alternate, {words.user} first"
            )
        elif asked:
            if calls and calls[-1]:
                raise DataError(
                    f"{words.turn} {position} is from {message.speaker!r}, and the call of a tool "
                    "before it has no response"
                )
            texts.append(message.text)
            responses.append(())
        else:
            texts.append(message.text)
            uses_tools = uses_tools or bool(message.calls)
            learned.append(message.learned)
            calls.append(message.calls)
        before = message
    _check_ends(words, texts)
    tool_use = ToolUse(draft.tools, tuple(calls), tuple(responses)) if uses_tools else None
    return tuple(texts), tuple(learned), tool_use


def _check_joined(words: Words, position: int, before: Message, message: Message) -> None:
    """Refuses two messages of one answer that it cannot hold as they are."""
    if before.calls and message.text.strip():
        raise DataError(
            f"{words.turn} {position} is from {message.speaker!r} and says something behind the "
            "call of a tool; an answer says it before its calls, or after their responses"
        )
    if before.learned != message.learned:
        raise DataError(
            f"{words.turn}s {position - 1} and {position} are one answer, and 'loss' differs; give "
            "both the same"
        )


def _check_ends(words: Words, texts: list[str]) -> None:
    if not texts:
        raise DataError(f"the only {words.turn} is from {words.answer!r}; it answers nothing")
    if len(texts) % 2:
        raise DataError(
            f"the last of {len(texts)} {words.turn}s is from {words.user!r}; an answer must follow"
        )
