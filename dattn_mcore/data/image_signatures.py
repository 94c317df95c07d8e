"""What the first bytes of an image file say: its format, and why Pillow may not open it."""

from __future__ import annotations

from typing import BinaryIO

import PIL
from PIL import UnidentifiedImageError, features

from dattn_mcore.hf.image_rules_dattn import heif_is_readable

START = 64  # bytes that tell a format
_SIGNATURES = (
    b"\xff\xd8\xff",  # JPEG
    b"\x89PNG\r\n\x1a\n",
    b"GIF87a",
    b"GIF89a",
    b"BM",
    b"II*\0",  # TIFF
    b"MM\0*",
    b"\0\0\x01\0",  # ICO
    b"\0\0\0\x0cjP  ",  # JPEG 2000
    b"\xff\x4f\xff\x51",
    *(b"P%d" % kind for kind in range(1, 7)),  # PNM
)
_AVIF = (b"avif", b"avis")
_HEIC = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs")
_EITHER = (b"mif1", b"msf1")  # AVIF or HEIC, by the brands listed behind
# Formats that a build of Pillow may lack.
_FEATURES = {"AVIF": "avif", "WebP": "webp", "JPEG 2000": "jpg_2000"}
_NO_REASONS = ("", "could not create decoder object")  # what Pillow says of any damage


def is_known(start: bytes) -> bool:
    """Whether a file that begins so can be an image."""
    return start.startswith(_SIGNATURES) or _is_webp(start) or bool(_boxed(start))


def why_no_reader(start: bytes) -> str | None:
    """Why images of this format cannot be read here, as half a sentence; None where they can.

    Lets Pillow read HEIC first, where the package for it is installed.
    """
    name = _boxed(start)
    if name == "HEIC":
        if heif_is_readable():
            return None
        return "is a HEIC image; install the extra 'heif' (pillow-heif), or convert it to JPEG"
    if _is_webp(start):
        name = "WebP"
    elif start.startswith((b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")):
        name = "JPEG 2000"
    if name is None or features.check(_FEATURES[name]):
        return None
    return f"is a {name} image, which Pillow {PIL.__version__} cannot read here; convert it"


def why_no_header(file: BinaryIO, error: Exception) -> str:
    """Why Pillow found no header in a file of a known format, as half a sentence."""
    bits = _jpeg_bits(file)
    if bits not in (None, 8):
        return f"is a JPEG of {bits} bits a channel, which cannot be read; convert it to 8 bits"
    reason = " ".join(str(error).split())
    if isinstance(error, UnidentifiedImageError) or reason in _NO_REASONS:
        reason = f"it is truncated or damaged ({type(error).__name__})"
    elif "truncated" in reason.lower():
        reason = f"it is truncated or damaged ({reason})"
    return f"has a signature but no readable header; {reason}"


def is_plain_bmp(data: bytes) -> bool:
    """Whether a BMP has 24 bits a pixel and no compression: three plain bytes, as most have."""
    header = int.from_bytes(data[14:18], "little")
    bits = data[24:26] if header == 12 else data[28:30]
    packed = b"\0\0\0\0" if header == 12 else data[30:34]
    return int.from_bytes(bits, "little") == 24 and packed == b"\0\0\0\0"


def _is_webp(start: bytes) -> bool:
    return start[:4] == b"RIFF" and start[8:12] == b"WEBP"


def _boxed(start: bytes) -> str | None:
    """`AVIF` or `HEIC` by the brands of an ISO media file; None where it is neither."""
    if start[4:8] != b"ftyp":
        return None
    size = int.from_bytes(start[:4], "big")
    brands = [start[at : at + 4] for at in (8, *range(16, min(size, len(start)), 4))]
    if brands[0] in _AVIF or (brands[0] in _EITHER and set(brands) & set(_AVIF)):
        return "AVIF"
    return "HEIC" if brands[0] in (*_HEIC, *_EITHER) else None


def _jpeg_bits(file: BinaryIO) -> int | None:
    """Bits a channel that a JPEG's frame header names; None where there is none."""
    file.seek(0)
    if file.read(2) != b"\xff\xd8":
        return None
    while len(head := file.read(4)) == 4 and head[0] == 0xFF:
        kind = head[1]
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            return (file.read(1) or b"\x08")[0]
        file.seek(max(int.from_bytes(head[2:], "big") - 2, 0), 1)
    return None
