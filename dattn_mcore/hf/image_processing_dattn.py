"""Image processor for AnyRes: a base view and a canvas of tiles for each image (Pillow).

`anyres_stretch` resizes an image to the canvas; `anyres_letterbox` keeps its aspect ratio and
centres it on a canvas of zeros (before normalisation), as LLaVA-NeXT does.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs

POLICIES = ("anyres_stretch", "anyres_letterbox")


def best_canvas(image: tuple[int, int], canvases: list[tuple[int, int]]) -> tuple[int, int]:
    """The canvas that shows most pixels of an image, and of those the one that wastes least.

    Args:
        image: height and width.
        canvases: heights and widths to choose from; the first of equals wins.
    """

    def shown(canvas: tuple[int, int]) -> int:
        scale = min(canvas[1] / image[1], canvas[0] / image[0])
        return min(int(image[1] * scale) * int(image[0] * scale), image[0] * image[1])

    return max(canvases, key=lambda c: (shown(c), shown(c) - c[0] * c[1]))


def inner_size(image: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """Height and width of an image that keeps its aspect ratio and fills a canvas one way."""
    high, wide = canvas[0] / image[0], canvas[1] / image[1]
    if wide < high:
        return min(math.ceil(image[0] * wide), canvas[0]), canvas[1]
    return canvas[0], min(math.ceil(image[1] * high), canvas[1])


class DattnImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """What this processor takes beside the options of all image processors.

    image_policy: `anyres_stretch` or `anyres_letterbox`.
    anyres_grids: canvases that may be chosen, in tiles: [columns, rows].
    """

    image_policy: str
    anyres_grids: list[list[int]]


class DattnImageProcessor(PilBackend):
    """Cuts images into tiles of `size`.

    Gives `pixel_values` [tiles of all images, 3, height, width], of each image the base view (the
    image squashed to one tile) first, then the tiles of its canvas row by row; and `image_grids`
    [images, 2], columns and rows of each canvas. The canvas is the one of `anyres_grids` that
    shows most pixels of the image and wastes least, chosen as LLaVA-NeXT does.
    """

    valid_kwargs = DattnImagesKwargs
    model_input_names = ["pixel_values", "image_grids"]
    resample = PILImageResampling.BICUBIC
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    size = {"height": 384, "width": 384}
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    image_policy = "anyres_stretch"
    anyres_grids = [[1, 2], [2, 1], [2, 2], [1, 3], [3, 1], [1, 4], [4, 1]]

    def _preprocess(
        self,
        images: list[np.ndarray],
        size: SizeDict,
        resample: Any,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
        image_policy: str,
        anyres_grids: list[list[int]],
        return_tensors: Any,
        do_resize: bool = True,
        do_center_crop: bool | None = None,
        do_pad: bool | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Tiles of uint8 images [3, height, width], rescaled and normalised.

        Args that other image processors know and this one does not need (`crop_size`, `pad_size`,
        `disable_grouping`) are in `kwargs`.

        Raises:
            ValueError: the policy is unknown, or an option asks for what tiles cannot be.
        """
        if not do_resize or do_center_crop or do_pad:
            raise ValueError(
                "AnyRes resizes every image to its tiles: do_resize=False, do_center_crop and "
                "do_pad are not honoured; leave them out, or choose the canvas by image_policy"
            )
        if image_policy not in POLICIES:
            raise ValueError(
                f"image_policy is {image_policy!r}; it must be one of {', '.join(POLICIES)}"
            )
        height, width = size.height, size.width
        pixel_values, grids = [], []
        for image in images:
            targets = [(rows * height, columns * width) for columns, rows in anyres_grids]
            canvas_size = best_canvas(image.shape[-2:], targets)
            canvas = self.on_canvas(image, canvas_size, resample, image_policy)
            tiles = [self.resized(image, (height, width), resample)]
            for top in range(0, canvas_size[0], height):
                for left in range(0, canvas_size[1], width):
                    tiles.append(canvas[:, top : top + height, left : left + width])
            for tile in tiles:
                if do_rescale:
                    tile = self.rescale(image=tile, scale=rescale_factor)
                if do_normalize:
                    tile = self.normalize(image=tile, mean=image_mean, std=image_std)
                pixel_values.append(tile)
            grids.append([canvas_size[1] // width, canvas_size[0] // height])
        data = {"pixel_values": np.array(pixel_values), "image_grids": np.array(grids)}
        return BatchFeature(data=data, tensor_type=return_tensors)

    def on_canvas(
        self, image: np.ndarray, size: tuple[int, int], resample: Any, policy: str
    ) -> np.ndarray:
        """The image on its canvas, [3, *size]."""
        if policy == "anyres_stretch":
            return self.resized(image, size, resample)
        inner = inner_size(image.shape[-2:], size)
        margins = [
            (math.floor((outer - side) / 2), math.ceil((outer - side) / 2))
            for outer, side in zip(size, inner, strict=True)
        ]
        return np.pad(self.resized(image, inner, resample), ((0, 0), *margins))

    def resized(self, image: np.ndarray, size: tuple[int, int], resample: Any) -> np.ndarray:
        """The image in another size, [3, *size]."""
        return self.resize(image, SizeDict(height=size[0], width=size[1]), resample=resample)


__all__ = ["DattnImageProcessor"]
