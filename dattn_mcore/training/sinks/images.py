"""Images of examples, small enough for a tracker."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

LARGEST_SIDE = 512  # pixels


def pixels_of(path: Path) -> np.ndarray:
    """An image as uint8 [height, width, 3], its longer side at most `LARGEST_SIDE`."""
    with Image.open(path) as image:
        image.draft("RGB", (LARGEST_SIDE, LARGEST_SIDE))
        small = image.convert("RGB")
    small.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    return np.asarray(small)
