"""What the members of one sample of a tar shard are: its text, images, metadata, or a fault.

Every member has a role. One that has none would be dropped in silence, and a sample without its
question, or without its image, would count as trained: it makes the sample bad, with its name.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import PurePosixPath

from dattn_mcore.data.sources.metadata import left_aside, unused
from dattn_mcore.data.sources.record import decode_json
from dattn_mcore.data.sources.records.forms import matching
from dattn_mcore.errors import DataError

TEXT = ("json", "txt", "caption")
IMAGES = (
    "jpg",
    "jpeg",
    "png",
    "webp",
    "bmp",
    "gif",
    "tif",
    "tiff",
    "jp2",
    "ppm",
    "pgm",
    "avif",
    "ico",
    "heic",
    "heif",
)
# Energon's VQA in parts, by what stands behind the first dot of a member's name.
_PARTS = {
    "context.txt": "context",
    "question.txt": "context",
    "context.json": "context",
    "answers.txt": "answers",
    "answer.txt": "answers",
    "answers.json": "answers",
    "answer_weights.json": "answer_weights",
}
_NUMBERED = re.compile(r"\d+_image")  # LLaVA-OneVision-1.5 names images so, without a kind
_DOTS = "members of a sample share their name up to its first dot"


@dataclass(frozen=True)
class Roles:
    """The members of one sample.

    Attributes:
        text: Its record or caption; None where there is none.
        caption: Whether the text is a caption.
        images: Its images, in order.
        ignored: Metadata that is left aside.
        parts: Whether its texts are members of their own, of a question and its answer.
    """

    text: tarfile.TarInfo | None
    caption: bool
    images: list[tarfile.TarInfo]
    ignored: tuple[str, ...]
    parts: bool = False


def part_of(member: tarfile.TarInfo) -> str | None:
    """Which part of a question and its answer a member is; None: it is none."""
    return _PARTS.get(_ending(member))


def _ending(member: tarfile.TarInfo) -> str:
    return PurePosixPath(member.name).name.partition(".")[2].casefold()


def suffix(member: tarfile.TarInfo) -> str:
    """What stands behind the last dot of a member's name, in lower case."""
    return member.name.rpartition(".")[2].casefold()


def roles(
    key: str,
    members: list[tarfile.TarInfo],
    read: Callable[[tarfile.TarInfo], bytes],
    known: Collection[str],
) -> Roles:
    """Gives every member of a sample its role.

    Args:
        key: Name that the members share, up to its first dot.
        members: In the order of the shard.
        read: Reads a member.
        known: Names of metadata.

    Raises:
        DataError: A member has no role, or one that another has.
    """
    records: list[tarfile.TarInfo] = []
    captions: list[tarfile.TarInfo] = []
    images: list[tarfile.TarInfo] = []
    ignored: list[str] = []
    parts = [part for member in members if (part := part_of(member)) is not None]
    in_parts = {"context", "answers"} <= set(parts)
    if in_parts and len(set(parts)) < len(parts):
        raise DataError(f"the sample has the same part twice ({', '.join(sorted(parts))})")
    for member in members:
        if not member.isreg() or member.issparse():
            what = "a sparse file" if member.isreg() else "a link, or no regular file"
            raise DataError(f"member '{member.name}' is {what}; pack the shard from plain files")
        ending = _ending(member)
        kind = suffix(member)
        if in_parts and ending in _PARTS:
            continue
        if kind in IMAGES or _NUMBERED.fullmatch(ending):
            images.append(member)
        elif kind in TEXT:
            (records if kind == "json" else captions).append(member)
        elif kind in known or ending in known:
            ignored.append(f".{ending}")
        else:
            raise DataError(unused(f"member '{member.name}'", kind))
    if in_parts:
        if texts := records + captions:
            raise DataError(f"member '{texts[0].name}' is a text beside those of a question")
        return Roles(None, False, images, tuple(ignored), parts=True)
    for texts in (records, captions):
        if len(texts) > 1:
            names = f"members '{texts[0].name}' and '{texts[1].name}'"
            raise DataError(f"{names} are both texts of one sample; {_DOTS}, and one is its text")
    # Only beside a caption: a lone .json without a conversation is reported as what it is.
    if records and captions:
        if _is_properties(records[0], read, known):
            ignored.append(".json")
            records = []
        else:  # img2dataset's caption, in shards to which somebody added records
            ignored.append(f".{suffix(captions[0])}")
            captions = []
    text = next(iter(records or captions), None)
    if text is not None:
        _check_images(key, text, bool(captions), images)
    return Roles(text, bool(captions), images, tuple(ignored))


def _check_images(
    key: str, text: tarfile.TarInfo, caption: bool, images: list[tarfile.TarInfo]
) -> None:
    """A text is its sample's (`a.txt` beside `a.0.jpg`) or its image's (`a.v1.txt`, `a.v1.jpg`)."""
    if caption and not images:
        raise DataError(
            f"caption '{text.name}' has no image beside it; members of a sample must stand next "
            "to each other in the shard"
        )
    if _stem(text) == key:
        return
    for image in images:
        if _stem(image) != _stem(text):
            raise DataError(
                f"text '{text.name}' does not belong to image '{image.name}', though they are one "
                f"sample; {_DOTS}: name the text '{key}.{suffix(text)}' or replace the dots"
            )


def _stem(member: tarfile.TarInfo) -> str:
    return str(PurePosixPath(member.name.rpartition(".")[0]))


def _is_properties(
    member: tarfile.TarInfo, read: Callable[[tarfile.TarInfo], bytes], known: Collection[str]
) -> bool:
    """Whether a .json holds an image's properties (img2dataset writes those), no record."""
    try:
        found = decode_json(read(member))
    except DataError:
        return False  # a record that is malformed
    if not isinstance(found, dict) or "conversations" in found or matching(found):
        return False
    left_aside(found, (), known, where=f" of '{member.name}'")
    return True
