"""EXIF orientation of an image whose pixels are not read, and pixels turned by it."""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO

from PIL import Image

from dattn_mcore.hf.image_rules_dattn import METADATA, orientation_of

if TYPE_CHECKING:  # importing torch takes seconds, and making an index needs none of it
    from torch import Tensor

_MOST_CHUNKS = 100_000  # of a PNG, behind its header
# Orientation to (rows and columns swapped, then flipped top to bottom, then left to right).
_STEPS = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


def header_orientation(header: Image.Image, file: BinaryIO) -> int:
    """What `orientation_of` says of an image, without decoding it where that can be avoided.

    Args:
        header: The opened image, its pixels not read.
        file: It was opened from.

    Raises:
        ValueError: A PNG of so many chunks that looking for its metadata has no end.
    """
    if header.format != "PNG" or "exif" in header.info or _metadata_behind(file):
        return orientation_of(header)
    bare = Image.new("1", (1, 1))  # a PNG would be decoded before it says that it has no EXIF
    bare.info = header.info
    return orientation_of(bare)


def turned(pixels: Tensor, orientation: int) -> Tensor:
    """Pixels [height, width, channels] made upright; a view where nothing is flipped.

    The same as `dattn_mcore.hf.image_rules_dattn.upright` does with an image of Pillow.
    """
    swapped, down, across = _STEPS.get(orientation, (False, False, False))
    if swapped:
        pixels = pixels.transpose(0, 1)
    axes = [axis for axis, flipped in enumerate((down, across)) if flipped]
    return pixels.flip(axes) if axes else pixels


def _metadata_behind(file: BinaryIO) -> bool:
    """Whether chunks behind a PNG's header could hold an orientation; the position is kept."""
    before = file.tell()
    names = tuple(name.encode() for name in METADATA)
    file.seek(8)
    pixels = False
    try:
        for _ in range(_MOST_CHUNKS):
            head = file.read(8)
            if len(head) < 8 or head[4:] == b"IEND":
                return False
            length = int.from_bytes(head[:4], "big")
            kind, read = head[4:], 0
            pixels = pixels or kind == b"IDAT"
            if pixels and kind == b"eXIf":
                return True
            if pixels and kind in (b"tEXt", b"zTXt", b"iTXt"):
                keyword = file.read(min(length, 32))
                read = len(keyword)
                if keyword.startswith(names):
                    return True
            file.seek(length - read + 4, 1)
    finally:
        file.seek(before)
    raise ValueError(f"has over {_MOST_CHUNKS} chunks")
