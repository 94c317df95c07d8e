"""LLaMA-Factory's alpaca form: `{instruction, input?, output, history?, system?, images?}`.

The question is `instruction`, and `input` on a new line below it; `history` holds earlier pairs. An
`<image>` stands in the texts for each image.
Source: LLaMA-Factory's `data/README.md` and its `AlpacaDatasetConverter`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from dattn_mcore.data.sources.record import kind
from dattn_mcore.data.sources.records.draft import (
    Draft,
    Form,
    Message,
    Words,
    optional_text,
    text_of,
)
from dattn_mcore.data.sources.records.images import images_of
from dattn_mcore.data.sources.records.tool_calls import tools_of
from dattn_mcore.errors import DataError


def _read(record: Mapping[str, Any], known: Collection[str]) -> Draft:
    images, field = images_of(record, "images", "image")
    history = record.get("history") or []
    if not isinstance(history, list):
        raise DataError(f"'history' must be a list of pairs, got {kind(history)}")
    messages: list[Message] = []
    for number, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"'history'[{number}] must be a list of a question and an answer")
        where = f"'history'[{number}]"
        messages.append(Message("user", "instruction", text_of(pair[0], where)))
        messages.append(Message("answer", "output", text_of(pair[1], where)))
    asked = [text_of(record.get("instruction"), "'instruction'"), optional_text(record, "input")]
    messages.append(Message("user", "instruction", "\n".join(text for text in asked if text)))
    messages.append(Message("answer", "output", text_of(record.get("output"), "'output'")))
    words = Words("turn", "'history'", "instruction", "output", field)
    return Draft(
        messages=messages,
        images=images,
        words=words,
        system=optional_text(record, "system"),
        tools=tools_of(record.get("tools")),
    )


LLAMA_FACTORY = Form(
    name="llama_factory",
    used=frozenset(
        ("id", "instruction", "input", "output", "history", "system", "tools", "weight")
        + ("images", "image")
    ),
    image_key="images",
    image_keys=("images", "image"),
    matches=lambda record: (
        isinstance(record.get("instruction"), str) and isinstance(record.get("output"), str)
    ),
    read=_read,
)
