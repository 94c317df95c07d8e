"""Decoding with Pillow: the reference, the fallback, and the way for formats DALI refuses."""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dattn_mcore.data.image_files import ImageFile
from dattn_mcore.errors import DataError


def decode_with_pillow(image: ImageFile) -> Tensor:
    """Decodes one image as the Hugging Face image processors do.

    Transparency is laid over white, other modes are converted by Pillow, the first frame counts,
    EXIF orientation is not applied.

    Returns:
        uint8 [3, height, width] RGB (a view of channels-last memory).

    Raises:
        DataError: Pillow cannot decode it; a truncated file is an error.

    Source: `convert_to_rgb` of transformers 5 (`transformers/image_transforms.py`).
    """
    try:
        pixels = _pixels(image.data)
    except Exception as error:  # noqa: BLE001  (OSError, SyntaxError, struct.error, ...)
        reason = " ".join(str(error).split()) or type(error).__name__
        kind = "is truncated" if "truncated" in reason else "cannot be decoded"
        raise DataError(f"{image.who} {kind} ({reason})") from None
    # Copied for a tensor may be written to; Pillow's own memory is free by now, which matters for
    # images of a hundred megapixels.
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def _pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as opened:
        opened.load()
        return np.asarray(_to_rgb(opened))


def _to_rgb(image: Image.Image) -> Image.Image:
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, over).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _decode(image: ImageFile) -> Tensor | DataError:
    try:
        return decode_with_pillow(image)
    except DataError as error:
        return error


class PillowDecoder:
    """Decodes lists of images in a few threads (Pillow releases the interpreter lock)."""

    name = "pillow"

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(max(threads, 1), thread_name_prefix="decode")

    def decode(self, images: Sequence[ImageFile]) -> list[Tensor | DataError]:
        """Returns for each image uint8 [3, height, width] RGB, or why it cannot be decoded."""
        return list(self._pool.map(_decode, images))

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)
