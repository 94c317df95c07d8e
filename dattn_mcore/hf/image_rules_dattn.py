"""How an image file becomes RGB pixels, and which canvas it gets: one rule for everybody.

Training, the index, `preview`, evaluation and the exported processor all take it from here, so a
picture has the same pixels whether it comes as a path, a URL or an opened image. Pillow only.
"""

from __future__ import annotations

import base64
import functools
import importlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.request import urlopen

from PIL import Image

TRANSPARENCY = ("white", "drop")
TIES = ("aspect", "first")
# EXIF orientation to what makes the picture upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION = 0x0112
BAND = 4_000_000  # pixels that are laid over white at once
URL_SECONDS = 60.0
METADATA = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")  # hold an orientation


@dataclass(frozen=True)
class ImageRules:
    """What a run does with its images beside resizing them.

    Attributes:
        apply_orientation: Whether EXIF orientation is applied (what people see) or ignored.
        transparency: `white` (what is transparent lies over white) or `drop` (the colours under
            it are shown).
        anyres_ties: Which of equally good canvases `anyres_stretch` takes: `aspect` (the one
            nearest to the image's aspect ratio) or `first` (the first one listed).
    """

    apply_orientation: bool = True
    transparency: str = "white"
    anyres_ties: str = "aspect"

    def __post_init__(self) -> None:
        """Refuses unknown values."""
        for name, allowed in (("transparency", TRANSPARENCY), ("anyres_ties", TIES)):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")


# What held before there were rules to choose: of checkpoints and exports that name none.
OLD_RULES = ImageRules(apply_orientation=False, transparency="white", anyres_ties="first")


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation of an image, 1 to 8; 1 where it has none, or none that can be read.

    A PNG may be decoded for it, since its metadata may stand behind its pixels.
    """
    if image.format == "TIFF":  # turned by Pillow itself as it is loaded
        return 1
    try:
        value = image.getexif().get(ORIENTATION, 1)
        return int(value) if value in TURNS else 1
    except Exception:  # noqa: BLE001  (damaged EXIF: SyntaxError, struct.error, ...)
        return 1


def upright_size(width: int, height: int, orientation: int) -> tuple[int, int]:
    """Width and height of an image after its orientation is applied."""
    return (height, width) if orientation >= 5 else (width, height)


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """The image with its orientation applied, and forgotten."""
    if orientation not in TURNS:
        return image
    turned = image.transpose(TURNS[orientation])
    for name in METADATA:
        turned.info.pop(name, None)
    return turned


def to_rgb(image: Image.Image, rules: ImageRules) -> Image.Image:
    """An opened image as RGB: its first frame, transparency and orientation as the rules say.

    Modes other than RGB are converted by Pillow. The result may be the image itself.
    """
    image.load()
    orientation = orientation_of(image) if rules.apply_orientation else 1
    if rules.transparency == "white" and is_transparent(image):
        rgb = over_white(image)
    else:
        rgb = image if image.mode == "RGB" else image.convert("RGB")
    return upright(rgb, orientation)


def is_transparent(image: Image.Image) -> bool:
    """Whether an image has an alpha channel or a transparent colour."""
    return "A" in image.getbands() or image.info.get("transparency") is not None


def over_white(image: Image.Image) -> Image.Image:
    """A transparent image laid over white, a band at a time: RGBA copies of it would be large."""
    rgb = Image.new("RGB", image.size)
    rows = max(BAND // max(image.width, 1), 1)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        band = image.crop((0, top, image.width, bottom)).convert("RGBA")
        white = Image.new("RGBA", band.size, (255, 255, 255, 255))
        rgb.paste(Image.alpha_composite(white, band).convert("RGB"), (0, top))
    rgb.info = {name: value for name, value in image.info.items() if name != "transparency"}
    return rgb


def best_grid(
    image: tuple[int, int],
    tile: tuple[int, int],
    grids: Sequence[Any],
    ties: str,
) -> tuple[int, int]:
    """The canvas that shows most pixels of an image, and of those the one that wastes least.

    Shown are the image's pixels that survive fitting it into the canvas with its aspect ratio
    kept (never more than it has); wasted is the rest of the canvas.

    Args:
        image: Width and height.
        tile: Width and height of a tile.
        grids: (columns, rows) of the canvases to choose from.
        ties: Which of equals is taken: `aspect`, the one that resizing to the canvas squeezes
            least, or `first`.

    Returns:
        Columns and rows.

    Source: `select_best_resolution` of transformers, roundings included, is `first`.
    """
    width, height = image

    def merit(grid: Any) -> tuple[float, ...]:
        wide, high = grid[0] * tile[0], grid[1] * tile[1]
        scale = min(wide / width, high / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        if ties == "first":
            return shown, shown - wide * high
        one, other = wide * height, high * width
        return shown, shown - wide * high, -max(one, other) / min(one, other)

    columns, rows = max(grids, key=merit)  # the first of equals
    return int(columns), int(rows)


@functools.cache
def heif_is_readable() -> bool:
    """Lets Pillow read HEIC where the package pillow-heif works; says whether it does."""
    try:
        importlib.import_module("pillow_heif").register_heif_opener()
    except Exception:  # noqa: BLE001 (absent, or its libraries do not load)
        return False
    return True


def open_image(source: str) -> Image.Image:
    """Opens a path, a URL or base64 text as it is: not turned, its transparency kept.

    Raises:
        ValueError: It is none of them.
    """
    heif_is_readable()
    if source.startswith(("http://", "https://")):
        with urlopen(source, timeout=URL_SECONDS) as reply:  # noqa: S310 (http or https)
            return Image.open(io.BytesIO(reply.read()))
    if os.path.isfile(source):
        return Image.open(source)
    try:
        text = source.split(",", 1)[1] if source.startswith("data:image/") else source
        return Image.open(io.BytesIO(base64.decodebytes(text.encode())))
    except Exception as error:  # binascii's, Pillow's
        raise ValueError(
            f"an image must be a path, a URL or base64 text; {source[:80]!r} is none ({error})"
        ) from None


__all__ = ["OLD_RULES", "ImageRules", "best_grid", "open_image", "orientation_of", "to_rgb"]
