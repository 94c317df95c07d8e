"""Tar shards in WebDataset's form: members that share a name up to its first dot are one sample.

    000123.jpg  000123.json      a LLaVA record and its image
    000124.0.jpg 000124.1.jpg 000124.json   several images, in the order of their marks
    000125.jpg  000125.txt       an image and its caption (or .caption)
    000126.jpg  000126.txt  000126.json     as img2dataset writes it: .json without `conversations`

Any other member makes its sample bad, unless it is known metadata (`tar_roles.py`).
A record's `image` may name members; without it, the images of the sample are taken in the order
they stand in the shard. Members are read at their place: nothing is unpacked, and a shard can be
of any size. Source: https://github.com/webdataset/webdataset (naming of members).
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from dattn_mcore.data.sources.metadata import METADATA
from dattn_mcore.data.sources.place import ImagePlace, Place
from dattn_mcore.data.sources.record import RecordError, Sample, decode_json, parse_record
from dattn_mcore.data.sources.tar_members import tar_members
from dattn_mcore.data.sources.tar_roles import TEXT, roles, suffix
from dattn_mcore.errors import DataError
from dattn_mcore.types import IMAGE_MARK


class TarFile:
    """A tar shard, as `SourceFile` describes it."""

    image_folder: str | None = None

    def __init__(self, path: Path, known: Collection[str] = METADATA) -> None:
        """Opens the shard.

        Args:
            path: The shard.
            known: Names of metadata.

        Raises:
            DataError: It cannot be opened.
        """
        self.path, self._known = path, known
        try:
            self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"'{path}' cannot be read ({error.strerror})") from None

    def scan(self) -> Iterator[Place]:
        """Yields the place of every sample's text, with its images; reads no image."""
        key = ""
        members: list[tarfile.TarInfo] = []
        for member in _named(self.path):
            name = PurePosixPath(member.name)
            found = str(name.parent / name.name.partition(".")[0])
            if found != key and members:
                yield self._place(key, members)
                members = []
            key = found
            members.append(member)
        if members:
            yield self._place(key, members)

    def digest(self) -> str:
        """Returns a SHA-256 of the members' names and sizes and of all text."""
        digest = hashlib.sha256()
        for member in _named(self.path):
            digest.update(f"{member.name}\0{member.size}\0".encode("utf-8", "surrogateescape"))
            if member.isreg() and suffix(member) in TEXT:
                digest.update(self._read(member))
        return digest.hexdigest()

    def read(self, place: Place) -> tuple[Sample, tuple[ImagePlace, ...]]:
        """Reads and checks one record."""
        if place.fault:
            raise RecordError(place.fault, place.key)
        if not place.length:
            raise DataError("this sample of the shard has no .json or .txt member, or an empty one")
        raw = self._bytes(place.offset, place.length)
        record = _captioned(raw, place.images) if place.caption else decode_json(raw)
        if isinstance(record, dict) and record.get("image") is None and place.images:
            record["image"] = [image.name for image in place.images]
        sample = parse_record(record, place.key, self._known)
        used = _match(sample.images, place.images)
        for image in place.images:
            if image not in used:
                raise RecordError(f"image '{image.name}' is not used by the record", sample.id)
        return replace(sample, ignored=sample.ignored + place.ignored), used

    def image(self, place: Place, image: ImagePlace) -> bytes:
        """Reads the bytes of a member."""
        return self._bytes(image.offset, image.length)

    def share(self, place: Place) -> float:
        """Share of the bytes before a record."""
        return place.offset / max(os.fstat(self._handle).st_size, 1)

    def line(self, offset: int) -> str:
        """Byte of the shard."""
        return f"byte {offset}"

    def close(self) -> None:
        """Closes the shard."""
        os.close(self._handle)

    def _bytes(self, offset: int, length: int) -> bytes:
        try:
            return os.pread(self._handle, length, offset)
        except OSError as error:
            raise DataError(f"cannot be read from '{self.path}' ({error.strerror})") from None

    def _read(self, member: tarfile.TarInfo) -> bytes:
        return self._bytes(member.offset_data, member.size)

    def _place(self, key: str, members: list[tarfile.TarInfo]) -> Place:
        """One sample of the shard."""
        try:
            found = roles(key, members, self._read, self._known)
        except DataError as error:
            return Place(members[0].offset_data, 0, key, fault=str(error))
        images = tuple(ImagePlace(one.name, one.offset_data, one.size) for one in found.images)
        text = found.text
        if text is None:
            return Place(members[0].offset_data, 0, key, images)
        place = Place(text.offset_data, text.size, key, images, found.caption)
        return replace(place, ignored=found.ignored)


def _named(path: Path) -> Iterator[tarfile.TarInfo]:
    """Members but hidden ones: macOS adds `._name` to each, and WebDataset skips them, too."""
    for member in tar_members(path):
        if not PurePosixPath(member.name).name.startswith("."):
            yield member


def _captioned(raw: bytes, images: tuple[ImagePlace, ...]) -> dict[str, Any]:
    """A LLaVA record of a caption."""
    try:
        text = raw.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 ({error.reason} at byte {error.start})") from None
    marks = "\n".join([IMAGE_MARK] * len(images))
    return {"conversations": [{"from": "human", "value": marks}, {"from": "gpt", "value": text}]}


def _match(names: tuple[str, ...], images: tuple[ImagePlace, ...]) -> tuple[ImagePlace, ...]:
    """The members that a record's image names mean."""
    by_name = {image.name: image for image in images}
    by_name |= {PurePosixPath(image.name).name: image for image in images}
    if len(names) == len(images) == 1:
        return images  # one image, whatever the record calls it
    found = []
    for name in names:
        image = by_name.get(name) or by_name.get(PurePosixPath(name).name)
        if image is None:
            raise DataError(f"image '{name}' is no member of this sample in the shard")
        found.append(image)
    return tuple(found)
