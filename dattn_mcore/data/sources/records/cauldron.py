"""The Cauldron: `{images: [...], texts: [{user, assistant, source}, ...]}`.

The images stand in front of the first question. Source: the data set card of
HuggingFaceM4/the_cauldron, whose form Docmatix and FineVision have too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from dattn_mcore.data.sources.records.draft import (
    Draft,
    Form,
    Message,
    Words,
    is_list_of,
    learned_of,
    list_of,
    object_of,
    text_of,
    turn_metadata,
)
from dattn_mcore.data.sources.records.images import images_of
from dattn_mcore.data.sources.records.marks import place_images

_USED = frozenset(("user", "assistant", "loss"))


def _read(record: Mapping[str, Any], known: Collection[str]) -> Draft:
    images, field = images_of(record, "images")
    messages: list[Message] = []
    ignored: list[str] = []
    for number, pair in enumerate(list_of(record.get("texts"), "'texts'")):
        where = f"text {number}"
        found = object_of(pair, where)
        turn_metadata(found, _USED, (where, "texts"), known, ignored)
        asked = text_of(found.get("user"), f"{where}: 'user'")
        said = text_of(found.get("assistant"), f"{where}: 'assistant'")
        messages.append(Message("user", "user", asked))
        messages.append(Message("answer", "assistant", said, learned_of(found, where)))
    place_images(messages, images)
    words = Words("text", "'texts'", "user", "assistant", field)
    return Draft(messages=messages, images=images, words=words, ignored=ignored)


CAULDRON = Form(
    name="cauldron",
    used=frozenset(("id", "images", "texts", "weight")),
    image_key="images",
    image_keys=("images",),
    matches=lambda record: is_list_of(record.get("texts"), "user", "assistant"),
    read=_read,
    # FineVision's ratings of each pair.
    metadata=frozenset(
        name
        for base in ("relevance", "image_correspondence", "visual_dependency", "formatting")
        for name in (f"{base}_ratings", f"{base}_min")
    ),
)
