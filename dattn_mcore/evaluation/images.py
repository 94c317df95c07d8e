"""Opens the images of questions, and refuses what is missing, damaged or outside the folder."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from dattn_mcore.errors import DataError

MAX_PIXELS = 100_000_000


def check_images(folder: str | Path, paths: list[tuple[str, str]]) -> Path:
    """Checks that every image is there before anything slow begins.

    Args:
        folder: image folder.
        paths: (who asks, path below the folder) for every image.

    Returns:
        The resolved folder.

    Raises:
        DataError: naming the first image that is missing or outside the folder.
    """
    root = Path(folder).resolve()
    if paths and not root.is_dir():
        raise DataError(f"--image-folder {folder} is no folder; give the one image paths start in")
    for who, path in paths:
        file = (root / path).resolve()
        if not file.is_relative_to(root):
            raise DataError(f"{who}: image {path!r} is outside {folder}; paths must stay inside")
        if not file.is_file():
            raise DataError(f"{who}: image {path!r} is not in {folder}")
    return root


def open_image(root: Path, path: str, who: str) -> Image.Image:
    """Decodes an image, first frame.

    Raises:
        DataError: it is no image, truncated, or too large.
    """
    try:
        with Image.open(root / path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"{who}: image {path!r} has {image.width} x {image.height} pixels; at most "
                    f"{MAX_PIXELS} are decoded"
                )
            image.load()
            return image if image.mode == "RGB" else _to_rgb(image)
    except DataError:
        raise
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{who}: image {path!r} cannot be decoded ({reason})") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    """Transparency over white, other modes by Pillow, as in training."""
    if "A" in image.getbands() or "transparency" in image.info:
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, over).convert("RGB")
    return image.convert("RGB")
