"""Image files, checked before anything decodes them.

The order of checks: inside the folder (symbolic links resolved), a regular file, a size that
cannot be a mistake, a known signature, a readable header, the pixel cap. What only decoding can
show (a truncated or damaged scan) is left to the decoder, unless the end marker already tells.
"""

from __future__ import annotations

import contextlib
import io
import os
import stat
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from dattn_mcore.data.image_orientation import header_orientation
from dattn_mcore.data.image_rules import DEFAULT_RULES
from dattn_mcore.data.image_signatures import (
    START,
    is_known,
    is_plain_bmp,
    why_no_header,
    why_no_reader,
)
from dattn_mcore.errors import DataError
from dattn_mcore.hf.image_rules_dattn import ImageRules, is_transparent, upright_size

# What a missing image is looked for under. Not by listing its folder: that can hold a million.
_EXTENSIONS = ("jpg", "jpeg", "png", "gif", "webp", "bmp", "JPG", "JPEG", "PNG")


@dataclass(frozen=True)
class ImageFile:
    """An image file that passed the checks.

    Attributes:
        who: How messages name it: annotation id and path.
        data: Its bytes.
        format: Pillow's name of the format ("JPEG", "PNG", ...).
        mode: Pillow's mode ("RGB", "L", ...).
        plain: Whether a channel is one byte in it: no PNG of 16 bits, no BMP of other than 24.
        transparent: Whether it has an alpha channel or a transparent colour.
        animated: Whether a PNG or WebP has several frames (the first one counts).
        width: Pixels, after its orientation is applied.
        height: Pixels, after its orientation is applied.
        ends_whole: Whether its end is where its format says. If not, only a strict decoder can
            tell a truncated file from one with bytes appended.
        orientation: EXIF orientation that is applied; 1 where none is.
        rules: What the run does with images.
    """

    who: str
    data: bytes
    format: str
    mode: str
    plain: bool
    transparent: bool
    animated: bool
    width: int
    height: int
    ends_whole: bool
    orientation: int = 1
    rules: ImageRules = DEFAULT_RULES


def check_folder(folder: str | Path, setting: str = "data.image_folder") -> Path:
    """Returns the resolved image folder, or raises DataError if it is none."""
    # Pillow warns about large images; the project's own cap decides about them.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    # It says so of damaged EXIF, which turns nothing; once an image would fill the console.
    warnings.filterwarnings("ignore", message="Corrupt EXIF data", category=UserWarning)
    path = Path(folder)
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise DataError(f"{setting}: '{folder}' {what}; give the folder that image paths start in")
    return path.resolve()


def read_image_file(
    folder: Path,
    relative: str,
    sample_id: str,
    max_pixels: int,
    rules: ImageRules = DEFAULT_RULES,
) -> ImageFile:
    """Reads and checks one image file.

    Args:
        folder: Image folder, resolved (`check_folder`).
        relative: Path below it, from the annotation.
        sample_id: Annotation id, for messages.
        max_pixels: Most pixels (width x height) that will be decoded.
        rules: What the run does with images.

    Raises:
        DataError: One line that names annotation id and path.
    """
    who = f"annotation {sample_id!r}: image '{relative}'"
    return check_image(who, read_bytes(folder, relative, who, max_pixels), max_pixels, rules)


def read_bytes(folder: Path, relative: str, who: str, max_pixels: int) -> bytes:
    """Reads a file below the image folder, whatever is in it.

    Raises:
        DataError: It is missing, outside, no regular file, unreadable, or too large for an image.
    """
    with _opened(folder, relative, who, max_pixels) as file:
        return file.read()


def check_image(
    who: str, data: bytes, max_pixels: int, rules: ImageRules = DEFAULT_RULES
) -> ImageFile:
    """Checks the bytes of an image.

    Args:
        who: How messages name it.
        data: All bytes of the file.
        max_pixels: Most pixels (width x height) that will be decoded.
        rules: What the run does with images.

    Raises:
        DataError: One line that starts with `who`.
    """
    file = io.BytesIO(data)
    with _header(who, file, max_pixels) as header:
        image_format = header.format or ""
        deep = image_format == "PNG" and data[24] > 8
        orientation = _orientation(who, header, file, rules)
        width, height = upright_size(header.width, header.height, orientation)
        return ImageFile(
            who=who,
            data=data,
            format=image_format,
            mode=header.mode,
            plain=not deep and (image_format != "BMP" or is_plain_bmp(data)),
            transparent=is_transparent(header),
            animated=image_format in ("PNG", "WEBP") and getattr(header, "is_animated", False),
            width=width,
            height=height,
            ends_whole=_ends_whole(data, image_format),
            orientation=orientation,
            rules=rules,
        )


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What an image's header says: Pillow's name of its format, width and height when upright."""

    format: str
    width: int
    height: int


def probe_image(
    who: str, data: bytes, max_pixels: int, rules: ImageRules = DEFAULT_RULES
) -> ImageHeader:
    """Checks bytes as `check_image` does, and returns the header's part only."""
    file = io.BytesIO(data)
    with _header(who, file, max_pixels) as header:
        return _read_header(who, header, file, rules)


def probe_image_file(
    folder: Path,
    relative: str,
    max_pixels: int,
    hint: bool = True,
    rules: ImageRules = DEFAULT_RULES,
) -> ImageHeader:
    """Checks a file as `read_image_file` does, but reads its header only.

    Args:
        folder: Image folder, resolved (`check_folder`).
        relative: Path below it, from the annotation.
        max_pixels: Most pixels (width x height) that will be decoded.
        hint: Whether a missing image is looked for under other extensions.
        rules: What the run does with images.

    Raises:
        DataError: One line that starts with the image's path.
    """
    who = f"image '{relative}'"
    with (
        _opened(folder, relative, who, max_pixels, hint) as file,
        _header(who, file, max_pixels) as header,
    ):
        return _read_header(who, header, file, rules)


def _read_header(who: str, header: Image.Image, file: BinaryIO, rules: ImageRules) -> ImageHeader:
    orientation = _orientation(who, header, file, rules)
    size = upright_size(header.width, header.height, orientation)
    return ImageHeader(header.format or "", *size)


def _orientation(who: str, header: Image.Image, file: BinaryIO, rules: ImageRules) -> int:
    """The EXIF orientation that will be applied, 1 where none is."""
    if not rules.apply_orientation:
        return 1
    try:
        return header_orientation(header, file)
    except ValueError as error:
        raise DataError(f"{who} {error}; it cannot be a picture") from None


@contextlib.contextmanager
def _header(who: str, file: BinaryIO, max_pixels: int) -> Iterator[Image.Image]:
    """An image whose header is read, and no pixels; checked."""
    start = file.read(START)
    if not start:
        raise DataError(f"{who} is an empty file")
    if not is_known(start):
        raise DataError(f"{who} is not an image (unknown signature {start[:4].hex(' ')})")
    if (why := why_no_reader(start)) is not None:
        raise DataError(f"{who} {why}")
    file.seek(0)
    # Pillow's own limit, of the whole process, must not be below ours. It stays as a guard against
    # what no header says: the picture inside an icon is decoded with a size of its own.
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        opened = Image.open(file)
    except Image.DecompressionBombError as error:
        raise DataError(
            f"{who} is too large ({error}); data.max_image_pixels is {max_pixels}"
        ) from None
    except Exception as error:  # noqa: BLE001  (OSError, SyntaxError, struct.error, ...)
        raise DataError(f"{who} {why_no_header(file, error)}") from None
    with opened:
        if opened.width * opened.height > max_pixels:
            raise DataError(
                f"{who} is too large: {opened.width} x {opened.height} pixels, "
                f"data.max_image_pixels is {max_pixels}"
            )
        if not opened.width or not opened.height:
            raise DataError(f"{who} has no pixels ({opened.width} x {opened.height})")
        yield opened


@contextlib.contextmanager
def _opened(
    folder: Path, relative: str, who: str, max_pixels: int, hint: bool = True
) -> Iterator[BinaryIO]:
    """A regular file below `folder`, of a size that an image can have; never blocks on a FIFO."""
    max_bytes = 8 * max_pixels + 2**20
    path = folder / relative
    try:
        resolved = path.resolve(strict=True)
    except FileNotFoundError:
        raise DataError(
            f"{who} does not exist below '{folder}' (data.image_folder)"
            f"{_sibling(path) if hint else ''}"
        ) from None
    except (OSError, RuntimeError) as error:
        raise DataError(f"{who} cannot be resolved ({error})") from None
    if not resolved.is_relative_to(folder):
        raise DataError(
            f"{who} leads to '{resolved}', outside '{folder}' (data.image_folder); move or mount "
            "it inside"
        )
    try:
        handle = os.open(resolved, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"{who} cannot be opened ({error.strerror})") from None
    try:
        status = os.fstat(handle)
        if stat.S_ISDIR(status.st_mode):
            raise DataError(f"{who} is a folder, not a file")
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{who} is not a regular file (a pipe, socket or device)")
        if status.st_size > max_bytes:
            raise DataError(
                f"{who} is too large: {status.st_size} bytes cannot be an image within "
                "data.max_image_pixels"
            )
        with os.fdopen(handle, "rb", closefd=False) as file:
            yield file
    except OSError as error:
        raise DataError(f"{who} cannot be read ({error.strerror})") from None
    finally:
        os.close(handle)


def _sibling(path: Path) -> str:
    """A hint where the image is there under another extension (OCR-VQA is shipped so)."""
    for extension in _EXTENSIONS:
        other = path.parent / f"{path.stem}.{extension}"
        if os.path.exists(other):  # False, no error, where a name is too long
            return f"; '{other.name}' is there, with another extension"
    return ""


def _ends_whole(data: bytes, image_format: str) -> bool:
    """Says whether the file's end is where its format puts it (1 microsecond, no decoding)."""
    if image_format == "JPEG":
        return data.endswith(b"\xff\xd9")
    if image_format == "PNG":
        return data[-8:-4] == b"IEND"
    if image_format == "WEBP":
        return int.from_bytes(data[4:8], "little") + 8 == len(data)
    if image_format == "BMP":
        return int.from_bytes(data[2:6], "little") == len(data)
    return False
