"""Samples of Megatron-Energon's tars: VQA's parts, and the records of LLaVA-OneVision-1.5.

VQA: parts `context` (or `question`) and `answers` (or `answer`), each a text or JSON, beside an
image. LLaVA-OneVision-1.5: `{texts: [{role, content}], media: image, name: [parts]}`.
Sources: Energon's `VQASample`; the conversion scripts of LLaVA-OneVision-1.5.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from dattn_mcore.data.sources.metadata import is_filled
from dattn_mcore.data.sources.records.draft import (
    Draft,
    Form,
    Message,
    Words,
    is_list_of,
    text_of,
)
from dattn_mcore.data.sources.records.images import images_of
from dattn_mcore.data.sources.records.marks import place_images
from dattn_mcore.data.sources.records.messages import MESSAGES
from dattn_mcore.errors import DataError


def _read(record: Mapping[str, Any], known: Collection[str]) -> Draft:
    media = record.get("media")
    if media not in (None, "image", "text"):
        raise DataError(f"'media' is {media!r}; only text and images are read")
    images, field = images_of(record, "images", "name")
    if is_filled(record.get("texts")):
        return MESSAGES.read(
            {"messages": record["texts"], "images": record.get(field.strip("'"))}, known
        )
    asked = text_of(record.get("context"), "'context'")
    messages = [Message("user", "context", asked), Message("answer", "answers", _answer(record))]
    place_images(messages, images)
    words = Words("text", "'context'", "context", "answers", field)
    return Draft(messages=messages, images=images, words=words)


def _answer(record: Mapping[str, Any]) -> str:
    value = record.get("answers")
    if isinstance(value, list):
        different = list(dict.fromkeys(text_of(one, "'answers'") for one in value))
        if len(different) != 1:
            raise DataError(
                f"'answers' holds {len(different)} different answers; which one is learned must "
                "not depend on chance: keep one"
            )
        return different[0]
    return text_of(value, "'answers'")


ENERGON = Form(
    name="energon",
    used=frozenset(("id", "context", "answers", "texts", "media", "name", "images", "weight")),
    image_key="images",
    image_keys=("images", "name"),
    ways=(("texts",), ("context", "answers")),
    matches=lambda record: (
        is_list_of(record.get("texts"), "role", "content")
        or (is_filled(record.get("context")) and is_filled(record.get("answers")))
    ),
    read=_read,
    metadata=frozenset(("answer_weights",)),
)
