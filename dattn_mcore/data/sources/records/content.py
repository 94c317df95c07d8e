"""Typed parts of a message's content, as Hugging Face, OpenAI and Qwen write them."""

from __future__ import annotations

from typing import Any

from dattn_mcore.data.sources.metadata import is_filled
from dattn_mcore.data.sources.record import Inside, kind
from dattn_mcore.data.sources.records.draft import object_of, text_of
from dattn_mcore.data.sources.records.images import image_of_part
from dattn_mcore.errors import DataError
from dattn_mcore.types import IMAGE_MARK

_IMAGES = ("image", "image_url")
_REFUSED = {
    "video": "a video",
    "video_url": "a video",
    "audio": "a sound",
    "input_audio": "a sound",
    "audio_url": "a sound",
}
_USED = frozenset(("type", "text", "image", "image_url", "path", "url", "base64", "bytes"))


def content_of(value: Any, where: str, inline: list[str | Inside | None]) -> str:
    """The text of a message's content, a mark for each image.

    Args:
        value: A text, or a list of typed parts.
        where: How messages call the message.
        inline: Gets the image of each typed part; None where the record's next one is meant.

    Raises:
        DataError: It is none of these, or holds more than text and images.
    """
    if not isinstance(value, list):
        return text_of(value, f"{where}: 'content'")
    said = []
    for number, part in enumerate(value):
        place = f"{where}, part {number}"
        found = {key: one for key, one in object_of(part, place).items() if is_filled(one)}
        kind_of_part = _kind_of(found, place)
        if kind_of_part == "image":
            inline.append(image_of_part(found, place))
            said.append(IMAGE_MARK)
        else:
            said.append(text_of(found.get("text", ""), f"{place}: 'text'"))
    shown = IMAGE_MARK in said
    if shown and any(IMAGE_MARK in text and text != IMAGE_MARK for text in said):
        raise DataError(f"{where}: {IMAGE_MARK} stands in a text beside image parts; use one way")
    return "".join(said)


def _kind_of(part: dict[str, Any], where: str) -> str:
    """`text` or `image`; parts of Qwen-VL's files have no type."""
    named = part.get("type")
    if named is None:
        named = next((key for key in ("image", "text", *_REFUSED) if key in part), None)
    if named in _REFUSED:
        raise DataError(f"{where} is {_REFUSED[str(named)]}; only text and images are read")
    if named in _IMAGES:
        more = set(part) - _USED - {"detail"} | ({"text"} & set(part))
        if more:
            raise DataError(f"{where}: an image part holds '{min(more)}', which is not read")
        return "image"
    if named == "text":
        if more := set(part) - {"type", "text"}:
            raise DataError(f"{where}: a text part holds '{min(more)}', which is not read")
        return "text"
    said = (
        f"'type' is {named!r}"
        if named is not None
        else f"a part holds {kind(part) if not part else ', '.join(sorted(part))}"
    )
    raise DataError(f"{where}: {said}; it must be 'text', 'image' or 'image_url'")
