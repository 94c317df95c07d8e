"""A text `prompt` beside `messages`: a copy of what the conversation holds, as in sets of H4.

In UltraChat 200k it is the first question, in No Robots the first message, which may be a system
turn.
Source: the data set cards of HuggingFaceH4/ultrachat_200k and HuggingFaceH4/no_robots.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dattn_mcore.data.sources.metadata import is_filled
from dattn_mcore.errors import DataError

_TURNS = ("messages", "conversations")


def copied_prompt(record: Mapping[str, Any]) -> list[str]:
    """The keys of a record that hold a copy of its turns: `prompt`, or none.

    Args:
        record: Of the form `messages` or `swift`.

    Raises:
        DataError: `prompt` is a text and no copy; one of the two would be dropped.
    """
    prompt = record.get("prompt")
    key = next((key for key in _TURNS if isinstance(record.get(key), list)), None)
    if (
        key is None
        or not isinstance(prompt, str)
        or not prompt
        or is_filled(record.get("completion"))
    ):
        return []
    turns = [turn for turn in record[key] if isinstance(turn, dict)]
    asked = [turn for turn in turns if turn.get("role") == "user"]
    said = [turn.get("content") for turn in (*turns[:1], *asked[:1])]
    if prompt.strip() in [text.strip() for text in said if isinstance(text, str)]:
        return ["prompt"]
    raise DataError(
        f"'prompt' is a text, and neither the first message of '{key}' nor its first question; "
        "take it out, or make it a message"
    )
