"""Image processor: files and opened images to the tiles that the model was trained on (Pillow).

One square tile an image: `stretch` resizes it to the square, `pad` puts it on a square of the
mean's colour first, `crop` cuts the middle out. AnyRes, a base view and a canvas of tiles:
`anyres_stretch` resizes it to the canvas; `anyres_letterbox` keeps its aspect ratio and centres it
on a canvas of zeros (before normalisation), as LLaVA-NeXT does.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image
from transformers import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs

from .image_rules_dattn import ImageRules, best_grid, open_image, orientation_of, to_rgb, upright

UNUSED = ("do_pad", "pad_size", "do_center_crop", "crop_size")  # of all image processors
SQUARE_POLICIES = ("stretch", "pad", "crop")
POLICIES = (*SQUARE_POLICIES, "anyres_stretch", "anyres_letterbox")


def inner_size(image: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """Height and width of an image that keeps its aspect ratio and fills a canvas one way."""
    high, wide = canvas[0] / image[0], canvas[1] / image[1]
    if wide < high:
        return min(math.ceil(image[0] * wide), canvas[0]), canvas[1]
    return canvas[0], min(math.ceil(image[1] * high), canvas[1])


def on_square(image: np.ndarray, colour: list[int]) -> np.ndarray:
    """The image [3, height, width] in the middle of a square of one colour."""
    height, width = image.shape[-2:]
    side = max(height, width)
    square = np.empty((len(colour), side, side), image.dtype)
    square[:] = np.array(colour, image.dtype)[:, None, None]
    top, left = (side - height) // 2, (side - width) // 2
    square[:, top : top + height, left : left + width] = image
    return square


class DattnImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """What this processor takes beside the options of all image processors.

    image_policy: one of `POLICIES`.
    anyres_grids: canvases that may be chosen, in tiles: [columns, rows].
    apply_orientation: whether the EXIF orientation of images is applied, or ignored.
    transparency: `white`, what is transparent lies over white; `drop`, it is dropped.
    anyres_ties: which of equal canvases `anyres_stretch` takes, `aspect` or `first`.
    """

    image_policy: str
    anyres_grids: list[list[int]]
    apply_orientation: bool
    transparency: str
    anyres_ties: str


class DattnImageProcessor(PilBackend):
    """Cuts images into tiles of `size`.

    Gives `pixel_values` [tiles of all images, 3, height, width]. With AnyRes, of each image the
    base view (the image squashed to one tile) comes first, then the tiles of its canvas row by
    row, and there is `image_grids` [images, 2], columns and rows of each canvas: the one of
    `anyres_grids` that shows most pixels of the image and wastes least, as LLaVA-NeXT chooses it.

    Images may be paths, URLs and base64 text, or opened by Pillow: the same file has the same
    pixels either way. Arrays and tensors are taken as they are.
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
    # Of folders that name no rules: those of before there was a choice.
    apply_orientation = False
    transparency = "white"
    anyres_ties = "first"

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Opens what is a path, a URL or base64 text; transformers would turn and flatten it."""
        if isinstance(image_url_or_urls, list | tuple):
            return [self.fetch_images(item) for item in image_url_or_urls]
        if isinstance(image_url_or_urls, str):
            return open_image(image_url_or_urls)
        return super().fetch_images(image_url_or_urls)

    def process_image(
        self,
        image: Any,
        do_convert_rgb: bool | None = None,
        input_data_format: Any = None,
        apply_orientation: bool | None = None,
        transparency: str | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """One image as an array [channels, height, width], by the rules of training."""
        if isinstance(image, Image.Image):
            rules = ImageRules(
                self.apply_orientation if apply_orientation is None else apply_orientation,
                transparency or self.transparency,
            )
            if do_convert_rgb:
                image, do_convert_rgb = to_rgb(image, rules), False
            elif rules.apply_orientation:
                image = upright(image, orientation_of(image))
        return super().process_image(
            image, do_convert_rgb=do_convert_rgb, input_data_format=input_data_format, **kwargs
        )

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
        anyres_ties: str,
        return_tensors: Any,
        **kwargs: Any,
    ) -> BatchFeature:
        """Tiles of uint8 images [3, height, width], rescaled and normalised.

        Raises:
            ValueError: the policy, or the rule for ties, is unknown, or another option is given
                that would make other tiles than the model was trained on.
        """
        strange = [name for name in UNUSED if kwargs.get(name)]
        if strange or kwargs.get("do_resize") is False:
            raise ValueError(
                f"{(strange or ['do_resize'])[0]} cannot be given: tiles are of the size that the "
                "model was trained on, as image_policy says"
            )
        if image_policy not in POLICIES:
            raise ValueError(
                f"image_policy is {image_policy!r}; it must be one of {', '.join(POLICIES)}"
            )
        ties = ImageRules(anyres_ties=anyres_ties).anyres_ties  # refuses what is unknown
        ties = ties if image_policy == "anyres_stretch" else "first"
        tile_size = (size.height, size.width)
        pixel_values, grids = [], []
        for image in images:
            if image_policy in SQUARE_POLICIES:
                tiles = [self.square(image, tile_size, resample, image_policy, image_mean)]
            else:
                shape = (image.shape[-1], image.shape[-2])
                grid = best_grid(shape, tile_size[::-1], anyres_grids, ties)
                tiles = self.views(image, grid, tile_size, resample, image_policy)
                grids.append(list(grid))
            for tile in tiles:
                if do_rescale:
                    tile = self.rescale(image=tile, scale=rescale_factor)
                if do_normalize:
                    tile = self.normalize(image=tile, mean=image_mean, std=image_std)
                pixel_values.append(tile)
        data = {"pixel_values": np.array(pixel_values)}
        if image_policy not in SQUARE_POLICIES:
            data["image_grids"] = np.array(grids)
        return BatchFeature(data=data, tensor_type=return_tensors)

    def square(
        self, image: np.ndarray, size: tuple[int, int], resample: Any, policy: str, mean: Any
    ) -> np.ndarray:
        """The one tile of an image, [3, *size]."""
        if policy == "crop":
            edge = SizeDict(shortest_edge=min(size))
            whole = self.resize(image, edge, resample=resample)
            return self.center_crop(whole, SizeDict(height=size[0], width=size[1]))
        if policy == "pad" and image.shape[-1] != image.shape[-2]:
            image = on_square(image, [int(channel * 255) for channel in mean])
        return self.resized(image, size, resample)

    def views(
        self,
        image: np.ndarray,
        grid: tuple[int, int],
        size: tuple[int, int],
        resample: Any,
        policy: str,
    ) -> list[np.ndarray]:
        """The base view of an image and the tiles of its canvas, each [3, *size]."""
        canvas_size = (grid[1] * size[0], grid[0] * size[1])
        canvas = self.on_canvas(image, canvas_size, resample, policy)
        tiles = [self.resized(image, size, resample)]
        for top in range(0, canvas_size[0], size[0]):
            for left in range(0, canvas_size[1], size[1]):
                tiles.append(canvas[:, top : top + size[0], left : left + size[1]])
        return tiles

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
