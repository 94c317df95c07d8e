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
from dattn_mcore.hf.image_rules_dattn import to_rgb

_BAND = 4_000_000  # pixels that leave Pillow's memory at once


def decode_with_pillow(image: ImageFile) -> Tensor:
    """Decodes one image by the run's rules (`dattn_mcore.hf.image_rules_dattn`).

    Returns:
        uint8 [3, height, width] RGB (a view of channels-last memory).

    Raises:
        DataError: Pillow cannot decode it; a truncated file is an error.
    """
    try:
        return torch.from_numpy(_pixels(image)).permute(2, 0, 1)
    except Exception as error:  # noqa: BLE001  (OSError, SyntaxError, struct.error, ...)
        reason = " ".join(str(error).split()) or type(error).__name__
        kind = "is truncated" if "truncated" in reason else "cannot be decoded"
        raise DataError(f"{image.who} {kind} ({reason})") from None


def _pixels(image: ImageFile) -> np.ndarray:
    """The image as an array [height, width, 3] that may be written to."""
    with Image.open(io.BytesIO(image.data)) as opened:
        rgb = to_rgb(opened, image.rules)
        pixels = np.empty((rgb.height, rgb.width, 3), np.uint8)
        # A band at a time: Pillow gives its pixels as bytes that it joins, twice the memory.
        rows = max(_BAND // rgb.width, 1)
        for top in range(0, rgb.height, rows):
            bottom = min(top + rows, rgb.height)
            pixels[top:bottom] = np.asarray(rgb.crop((0, top, rgb.width, bottom)))
        return pixels


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
