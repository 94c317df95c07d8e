"""Which image an image is, so that samples which show the same one can be found from the index."""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import dataclass

from dattn_mcore.data.sources.place import ImagePlace, Place
from dattn_mcore.data.sources.source import Source

NOT_HASHED = (0, 0)


@dataclass(frozen=True, slots=True)
class ImageIdentity:
    """Equal for all samples, of all sources, that show the same image.

    Attributes:
        file: Path of the image, or of the shard that holds it; its folder's links are resolved.
        place: In a shard: first byte and length in a tar; row group, row and number in a parquet
            file. Empty for a file of its own.
        content: With `data.hash_images` 128 bits of the SHA-256 of its bytes, as two numbers, and
            the other two are empty.
    """

    file: str
    place: tuple[int, ...] = ()
    content: tuple[int, int] = NOT_HASHED

    @property
    def digest(self) -> int:
        """64 bits of a hash of it, as the table of images keeps it: to group many of them."""
        if self.content != NOT_HASHED:
            return self.content[0]
        text = "\0".join([self.file, *map(str, self.place)]).encode("utf-8", "surrogatepass")
        return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")


def content_of(data: bytes) -> tuple[int, int]:
    """What `ImageIdentity.content` holds of an image's bytes."""
    found = hashlib.sha256(data).digest()
    return int.from_bytes(found[:8], "little"), int.from_bytes(found[8:16], "little")


def identity_of_image(
    source: Source,
    number: int,
    place: Place,
    image: ImagePlace,
    content: tuple[int, int] = NOT_HASHED,
) -> ImageIdentity:
    """Identity of an image of a sample.

    Args:
        source: Of the sample.
        number: Of its file within the source.
        place: Of the sample in that file.
        image: Where the image is.
        content: From `content_of`, where its bytes have been hashed.
    """
    if content != NOT_HASHED:
        return ImageIdentity("", (), content)
    if source.format == "tar":
        return ImageIdentity(_resolved(str(source.files[number])), (image.offset, image.length))
    if image.length:
        inside = (place.offset, place.length, image.offset)
        return ImageIdentity(_resolved(str(source.files[number])), inside)
    folder = _resolved(source.folder(number))
    return ImageIdentity(os.path.normpath(os.path.join(folder, image.name)))


@functools.lru_cache(maxsize=1024)
def _resolved(path: str) -> str:
    return os.path.realpath(path)
