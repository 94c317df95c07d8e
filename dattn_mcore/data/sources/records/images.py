"""What a record may hold in the place of an image, for every form."""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dattn_mcore.data.sources.metadata import METADATA, is_filled
from dattn_mcore.data.sources.record import Inside, check_text, kind
from dattn_mcore.errors import DataError

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
_DATA = re.compile(r"data:image[^,]{0,200},")  # Qwen's examples lack the kind: data:image;base64,
# What an image's object may hold: the image, OpenAI's `detail`, and properties.
_OF_AN_IMAGE = frozenset(("bytes", "path", "url", "detail", "format", "mode", "size", "id", "name"))
_REFERENCES = ("image", "path", "url", "image_url", "base64", "bytes")


@dataclass(frozen=True, slots=True)
class Cell:
    """An image of a table that is not read yet.

    Attributes:
        number: Of the cell in its row.
        name: How messages call it.
    """

    number: int
    name: str


def images_of(record: Mapping[str, Any], *keys: str) -> tuple[list[str | Inside], str]:
    """The images of a record, under one of some keys.

    Args:
        record: The record.
        keys: That may hold one image or a list of them.

    Returns:
        The images, and the quoted key that holds them.

    Raises:
        DataError: Two of the keys hold something, or what one holds is no image.
    """
    first = record.get(keys[0])
    if type(first) is str and first and not any(key in record for key in keys[1:]):
        return [_path(first, f"'{keys[0]}'")], f"'{keys[0]}'"  # what nearly all records hold
    filled = [key for key in keys if is_filled(record.get(key))]
    if len(filled) > 1:
        raise DataError(f"'{filled[0]}' and '{filled[1]}' both hold images; give one of them")
    field = f"'{(filled or keys)[0]}'"
    if not filled:
        return [], field
    value = record[filled[0]]
    values = value if isinstance(value, list) else [value]
    return [image_of(one, field) for one in values], field


def image_of(value: Any, field: str) -> str | Inside:
    """One image: a path, `{bytes, path}`, `{url}`, a data URI, or bytes.

    Args:
        value: What stands there.
        field: How messages call the place.

    Raises:
        DataError: It is none of these, a URL, or an object that holds more than an image.
    """
    if isinstance(value, str):
        return _path(value, field)
    if isinstance(value, Cell):
        return Inside(value.name, value.number)
    if isinstance(value, bytes):
        return Inside(f"an image in {field}", value)
    if isinstance(value, dict):
        if isinstance(value.get("bytes"), bytes):
            check_image_object(value, field)
            path = value.get("path")
            return Inside(
                path if isinstance(path, str) and path else f"an image in {field}", value["bytes"]
            )
        for key in ("path", "url"):
            if is_filled(value.get(key)):
                check_image_object(value, field)
                return image_of(value[key], field)
    raise DataError(f"{field} must be a path or a list of paths, got {kind(value)}")


def check_image_object(value: Mapping[str, Any], field: str) -> None:
    """Refuses an image's object that holds what would be dropped: a text, a video.

    Args:
        value: The object.
        field: How messages call the place.

    Raises:
        DataError: Names the key.
    """
    for key, one in value.items():
        if key not in _OF_AN_IMAGE and key.casefold() not in METADATA and is_filled(one):
            raise DataError(f"{field}: the object of an image holds '{key}', which is not read")


def image_of_part(part: Mapping[str, Any], where: str) -> str | Inside | None:
    """The image of a typed part; None where it stands for the next one of the record."""
    found = [key for key in _REFERENCES if is_filled(part.get(key))]
    if len(found) > 1:
        raise DataError(f"{where}: '{found[0]}' and '{found[1]}' both name an image; give one")
    if not found:
        return None
    value = part[found[0]]
    if found[0] == "base64":
        return _encoded(value, where)
    return image_of(value, f"{where}: '{found[0]}'")


def bytes_of(image: Inside) -> bytes:
    """The bytes of an image inside a record.

    Raises:
        DataError: It is no base64.
    """
    if isinstance(image.data, bytes):
        return image.data
    assert isinstance(image.data, str)
    try:
        return base64.b64decode("".join(image.data.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"holds malformed base64 ({error})") from None


def below(path: str, folder: str) -> str:
    """A path below the image folder, from one as the record has it.

    Args:
        path: Relative to the folder, or absolute and inside of it.
        folder: The image folder; "": not known.

    Raises:
        DataError: It leads out of the folder.
    """
    if path.startswith("/"):
        root = os.path.abspath(folder) if folder else ""
        inside = os.path.normpath(path)
        if root and os.path.commonpath([root, inside]) == root and inside != root:
            return os.path.relpath(inside, root)
        raise DataError(
            f"image path '{path}' is absolute; it must be relative to the folder, or lie in it"
        )
    if ".." in path and ".." in path.split("/"):
        raise DataError(f"image path '{path}' leaves the image folder ('..' is not allowed)")
    return path


def _path(value: str, field: str) -> str | Inside:
    if value.startswith("data:"):
        return _data_uri(value, field)
    value = value.removeprefix("file://")
    if "://" in value and _URL.match(value):
        raise DataError(
            f"{field} is the URL '{value[:80]}'; nothing is downloaded in training: download the "
            "images and give their paths"
        )
    if not value or "\0" in value:
        raise DataError(f"{field} holds the empty or unusable path {value!r}")
    check_text(field, value)
    return value


def _data_uri(value: str, field: str) -> Inside:
    match = _DATA.match(value)
    if match is None or not match[0].endswith("base64,"):
        raise DataError(
            f"{field} is a data URI that begins {value[:40]!r}; it must be "
            "'data:image/...;base64,...'"
        )
    return Inside(f"an image in {field}", value[match.end() :])


def _encoded(value: Any, where: str) -> Inside:
    if not isinstance(value, str):
        raise DataError(f"{where}: 'base64' must be a string, got {kind(value)}")
    match = _DATA.match(value)
    return Inside(f"an image in {where}", value[match.end() :] if match else value)
