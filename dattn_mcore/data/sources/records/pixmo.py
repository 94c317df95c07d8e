"""One image and a caption, or a question and its answer, in keys of their own: PixMo and its like.

`{image, caption}` or `{image, question, answer}`; PixMo's files name the image `image_url`, which
must hold a path once the images are downloaded. Sources: the data set cards of
allenai/pixmo-cap, pixmo-ask-model-anything and pixmo-cap-qa.
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
    text_of,
)
from dattn_mcore.data.sources.records.images import images_of
from dattn_mcore.data.sources.records.marks import place_images
from dattn_mcore.errors import DataError

_OTHERS = ("conversations", "messages", "texts", "instruction", "query", "prompt")


def _read(record: Mapping[str, Any], known: Collection[str]) -> Draft:
    images, field = images_of(record, "image", "images", "image_url")
    caption, question = record.get("caption"), record.get("question")
    for other in ("question", "answer"):
        if is_filled(caption) and is_filled(record.get(other)):
            raise DataError(f"'caption' and '{other}' are both there; make a sample of each")
    key = "answer" if is_filled(question) else "caption"
    asked = text_of(question, "'question'") if is_filled(question) else ""
    messages = [
        Message("user", "question", asked),
        Message("answer", key, text_of(record.get(key), f"'{key}'")),
    ]
    if not images:
        raise DataError(f"{field} is missing; a caption or an answer belongs to an image")
    place_images(messages, images)
    words = Words("text", "'question'", "question", "answer", field)
    return Draft(messages=messages, images=images, words=words)


def _matches(record: Mapping[str, Any]) -> bool:
    if any(is_filled(record.get(key)) for key in _OTHERS):
        return False
    if not any(is_filled(record.get(key)) for key in ("image", "images", "image_url")):
        return False
    pair = isinstance(record.get("question"), str) and isinstance(record.get("answer"), str)
    return pair or isinstance(record.get("caption"), str)


PIXMO = Form(
    name="pixmo",
    used=frozenset(
        ("id", "image", "images", "image_url", "caption", "question", "answer", "weight")
    ),
    image_key="image",
    image_keys=("image", "images", "image_url"),
    matches=_matches,
    read=_read,
    metadata=frozenset(("transcripts", "image_sha256")),
)
