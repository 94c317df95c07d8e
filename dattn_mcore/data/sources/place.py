"""Where a record and its images stand in a source file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ImagePlace:
    """Where an image's bytes are.

    Attributes:
        name: Path below the image folder, or the name it goes by inside the file.
        offset: Of its first byte in a tar shard; its number in the record for parquet.
        length: Bytes in a tar shard; 0 where the image is a file below the image folder.
    """

    name: str
    offset: int = 0
    length: int = 0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record stands.

    Attributes:
        offset: Of its first byte; the row group for parquet.
        length: Bytes; the row of the group for parquet.
        key: Name that stands in for an `id` the record lacks.
        images: Images that lie beside the record in the same file (tar).
        caption: What stands there is a caption's text, no record (tar).
        fault: Why the sample cannot be used, as far as the scan can tell; "" if it does not.
        ignored: Metadata beside the record that is left aside (tar).
    """

    offset: int
    length: int
    key: str = ""
    images: tuple[ImagePlace, ...] = ()
    caption: bool = False
    fault: str = ""
    ignored: tuple[str, ...] = ()
