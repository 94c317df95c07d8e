"""Where a record and its images stand in a source file."""

from __future__ import annotations

from dataclasses import dataclass

RECORD, CAPTION, PARTS = range(3)  # what stands at a place


@dataclass(frozen=True, slots=True)
class ImagePlace:
    """Where an image's bytes are.

    Attributes:
        name: Path below the image folder, or the name it goes by inside the file.
        offset: Of its first byte in a tar shard; its number in the record elsewhere.
        length: Bytes in a tar shard; 0 where the image is a file below the image folder; 1 where
            it lies inside its record, whose image it is by `offset` (counted from 1).
    """

    name: str
    offset: int = 0
    length: int = 0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record stands.

    Attributes:
        offset: Of its first byte; the row group (record batch) of a table.
        length: Bytes; the row of the group of a table.
        key: Name that stands in for an `id` the record lacks.
        images: Images that lie beside the record in the same file (tar).
        kind: What stands there: a record; a caption's text, or the members of a whole sample whose
            texts are its parts (tar).
        fault: Why the sample cannot be used, as far as the scan can tell; "" if it does not.
        ignored: Metadata beside the record that is left aside (tar).
    """

    offset: int
    length: int
    key: str = ""
    images: tuple[ImagePlace, ...] = ()
    kind: int = RECORD
    fault: str = ""
    ignored: tuple[str, ...] = ()
