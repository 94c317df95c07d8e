"""Whether a zstd file is whole: pyarrow's stream ends in silence where a file was cut.

Source: RFC 8878, sections 3.1.1 (frames, blocks) and 3.1.2 (skippable frames).
"""

from __future__ import annotations

from typing import BinaryIO

_MAGIC = b"\x28\xb5\x2f\xfd"
_SKIPPED = b"\x2a\x4d\x18"  # behind a byte from 0x50 to 0x5f
_DICTIONARY = (0, 1, 2, 4)  # bytes of its id
_CONTENT = (0, 2, 4, 8)  # bytes of the content's size
_REPEATED, _RESERVED = 1, 3  # types of blocks


def whole_frames(file: BinaryIO) -> str:
    """Walks over the blocks of a file by their headers; leaves it where it began.

    Returns:
        What is wrong, as far as headers show it; "" if nothing is.
    """
    size = file.seek(0, 2)
    place = 0
    while place < size:
        file.seek(place)
        magic = file.read(4)
        if magic == _MAGIC:
            place = _behind_frame(file, place + 4, size)
        elif magic[1:] == _SKIPPED and magic[0] >> 4 == 5:
            place += 8 + int.from_bytes(file.read(4), "little")
        else:
            return f"no frame starts at byte {place}"
        if place < 0:
            return "a block of a reserved type"
    file.seek(0)
    return "" if size and place == size else "it ends inside a frame"


def _behind_frame(file: BinaryIO, place: int, size: int) -> int:
    """Where a frame ends, from behind its magic number; -1: it is damaged."""
    described = file.read(1)
    if not described:
        return size + 1
    flags = described[0]
    single = flags >> 5 & 1
    content = _CONTENT[flags >> 6] or single
    place += 1 + (1 - single) + _DICTIONARY[flags & 3] + content
    last = False
    while not last:
        file.seek(place)
        raw = file.read(3)
        if len(raw) < 3:
            return size + 1
        header = int.from_bytes(raw, "little")
        last, kind, length = bool(header & 1), header >> 1 & 3, header >> 3
        if kind == _RESERVED:
            return -1
        place += 3 + (1 if kind == _REPEATED else length)
    return place + (4 if flags >> 2 & 1 else 0)
