"""WebDataset tar shards: files that share a name up to its first dot are one sample.

    000123.jpg  000123.json      an image and its record, of any form of `records/`
    000124.0.jpg 000124.1.jpg 000124.json   several images, in the order of their marks
    000125.jpg  000125.txt       an image and its caption (or .caption)
    000126.jpg  000126.txt  000126.json     as img2dataset writes it: .json without `conversations`
    000127.jpg  000127.context.txt  000127.answers.json   Energon's VQA, in parts

Any other member makes its sample bad, unless it is known metadata (`tar_roles.py`).
A record's images may name members; without that, the images of the sample are taken in the order
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
from dattn_mcore.data.sources.place import CAPTION, PARTS, RECORD, ImagePlace, Place
from dattn_mcore.data.sources.record import Inside, RecordError, Sample, decode_json
from dattn_mcore.data.sources.records.draft import Form, is_list_of
from dattn_mcore.data.sources.records.forms import parse_record
from dattn_mcore.data.sources.records.llava import LLAVA
from dattn_mcore.data.sources.tar_members import members_at, tar_members
from dattn_mcore.data.sources.tar_roles import TEXT, part_of, roles, suffix
from dattn_mcore.data.sources.unpack import hold
from dattn_mcore.errors import DataError
from dattn_mcore.types import IMAGE_MARK


class TarFile:
    """A tar shard, as `SourceFile` describes it."""

    image_folder: str | None = None

    def __init__(
        self,
        path: Path,
        known: Collection[str] = METADATA,
        form: Form = LLAVA,
        called: Path | None = None,
    ) -> None:
        """Opens the shard.

        Args:
            path: The shard.
            known: Names of metadata.
            form: Of its records.
            called: The file as the user named it, where `path` is the unpacked copy of it.

        Raises:
            DataError: It cannot be opened.
        """
        self.path, self._known, self._form = called or path, known, form
        try:
            self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(f"'{self.path}' cannot be read ({error.strerror})") from None
        if called is not None:
            hold(self._handle)

    def scan(self) -> Iterator[Place]:
        """Yields the place of every sample's text, with its images; reads no image."""
        key = ""
        members: list[tarfile.TarInfo] = []
        for member in _named(self.path, self._handle):
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
        for member in _named(self.path, self._handle):
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
        form = self._form
        record = self.raw(place)
        if place.kind == CAPTION:
            form, record = LLAVA, _captioned(record, place.images)
        beside = [image.name for image in place.images]
        sample = parse_record(record, place.key, self._known, form, beside)
        used = _match(sample.images, place.images, place.key)
        for image in place.images:
            if image not in used:
                raise RecordError(f"image '{image.name}' is not used by the record", sample.id)
        return replace(sample, ignored=sample.ignored + place.ignored), used

    def raw(self, place: Place) -> Any:
        """Reads a sample's text: its decoded record, or its caption as a string."""
        if place.kind == PARTS:
            return self._parts(place)
        raw = self._bytes(place.offset, place.length)
        if place.kind == CAPTION:
            return _decoded(raw).strip()
        record = decode_json(raw)
        if isinstance(record, list) and is_list_of(record, "from", "value"):
            return {"conversations": record}  # Energon's examples: a list of turns
        return record

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

    def _parts(self, place: Place) -> dict[str, Any]:
        """A record of a sample whose texts are members of their own, by their names."""
        record: dict[str, Any] = {}
        for member in members_at(self.path, self._handle, place.offset, place.length):
            name = part_of(member)
            if name and not PurePosixPath(member.name).name.startswith("."):
                raw = self._read(member)
                said = decode_json(raw) if suffix(member) == "json" else _decoded(raw).strip()
                record[name] = said
        return record

    def _place(self, key: str, members: list[tarfile.TarInfo]) -> Place:
        """One sample of the shard."""
        try:
            found = roles(key, members, self._read, self._known)
        except DataError as error:
            return Place(members[0].offset_data, 0, key, fault=str(error))
        images = tuple(ImagePlace(one.name, one.offset_data, one.size) for one in found.images)
        if found.parts:
            start = members[0].offset
            length = members[-1].offset_data + members[-1].size - start
            return Place(start, length, key, images, PARTS, ignored=found.ignored)
        text = found.text
        if text is None:
            return Place(members[0].offset_data, 0, key, images)
        kind = CAPTION if found.caption else RECORD
        return Place(text.offset_data, text.size, key, images, kind, ignored=found.ignored)


def _named(path: Path, handle: int) -> Iterator[tarfile.TarInfo]:
    """Members but hidden ones: macOS adds `._name` to each, and WebDataset skips them, too."""
    for member in tar_members(path, handle):
        if not PurePosixPath(member.name).name.startswith("."):
            yield member


def _decoded(raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 ({error.reason} at byte {error.start})") from None


def _captioned(text: str, images: tuple[ImagePlace, ...]) -> dict[str, Any]:
    """A LLaVA record of a caption."""
    marks = "\n".join([IMAGE_MARK] * len(images))
    return {"conversations": [{"from": "human", "value": marks}, {"from": "gpt", "value": text}]}


def _match(
    names: tuple[str | Inside, ...], images: tuple[ImagePlace, ...], key: str
) -> tuple[ImagePlace, ...]:
    """The members that a record's image names mean: in full, without folder, or without the key."""
    by_name = {image.name: image for image in images}
    by_name |= {PurePosixPath(image.name).name: image for image in images}
    by_name |= {image.name.removeprefix(f"{key}."): image for image in images}
    if len(names) == len(images) == 1 and isinstance(names[0], str):
        return images  # one image, whatever the record calls it
    found = []
    for name in names:
        if not isinstance(name, str):
            raise DataError("an image lies inside the record; in a shard it must be a member")
        image = by_name.get(name) or by_name.get(PurePosixPath(name).name)
        if image is None:
            raise DataError(f"image '{name}' is no member of this sample in the shard")
        found.append(image)
    return tuple(found)
