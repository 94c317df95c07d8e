"""How an image is cut into tiles, from its size alone: no pixels, no torch.

One square: `stretch`, `pad`, `crop` (see `dattn_mcore.data.resize`). AnyRes: a base view, the whole
image squashed to the square, and a canvas of columns x rows tiles that shows it at a higher
resolution. `anyres_stretch` resizes the image to the canvas; `anyres_letterbox` keeps its aspect
ratio and centres it on the canvas, whose borders are 0 before normalisation. Of equally good
canvases LLaVA-NeXT takes the first, which a letterbox does not mind; `anyres_stretch` takes the one
nearest to the image's aspect ratio, or a picture of 300 x 100 would be squeezed sixfold.

Source: grids, best fit and letterbox as in LLaVA-NeXT (transformers: `select_best_resolution`,
`get_patch_output_size`, `LlavaNextImageProcessorPil`); stretching as the D-Attn successors do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dattn_mcore.errors import ConfigError, DataError
from dattn_mcore.hf.image_rules_dattn import best_grid

SQUARE_POLICIES = ("stretch", "pad", "crop")
ANYRES_POLICIES = ("anyres_stretch", "anyres_letterbox")
POLICIES = SQUARE_POLICIES + ANYRES_POLICIES

Grid = tuple[int, int]  # columns, rows
_BANDS = 16  # times as many pixels may `pad`'s square have: it is made a band at a time
_ALWAYS = 32_000_000  # pixels that resizing may always take, however low data.max_image_pixels is


@dataclass(frozen=True)
class Tiling:
    """The views of one image.

    Attributes:
        columns: Tiles of the canvas from left to right.
        rows: Tiles of the canvas from top to bottom; the canvas is (columns * tile_size, rows *
            tile_size) pixels.
        base_view: Whether the whole image, squashed to one tile, comes before those of the canvas.
        resized: Width and height to which the image is resized for the canvas (`pad`: after a
            border has made it a square).
        offset: x and y of its upper left corner on the canvas; negative where `crop` cuts.
    """

    columns: int
    rows: int
    base_view: bool
    resized: tuple[int, int]
    offset: tuple[int, int]

    @property
    def num_tiles(self) -> int:
        """Tiles in all: 1 for a single square, else the base view and those of the canvas."""
        return self.columns * self.rows + self.base_view

    @property
    def grid(self) -> Grid:
        """Columns and rows beside a base view; (0, 0) for a single square."""
        return (self.columns, self.rows) if self.base_view else (0, 0)


def choose_tiling(
    width: int,
    height: int,
    *,
    policy: str,
    tile_size: int,
    grids: Sequence[Grid],
    ties: str = "aspect",
) -> Tiling:
    """Chooses the views of an image.

    Args:
        width: Pixels of the image, at least 1.
        height: Pixels of the image, at least 1.
        policy: One of `POLICIES` (setting data.image_policy).
        tile_size: Side of a tile in pixels.
        grids: (columns, rows) of the canvases that AnyRes may choose (setting data.anyres_grids).
        ties: Which of equally good ones `anyres_stretch` takes (setting data.anyres_ties):
            `aspect` or `first`. A letterbox takes the first.

    Raises:
        ConfigError: Unknown policy, or AnyRes without grids.
    """
    if policy not in POLICIES:
        raise ConfigError(f"data.image_policy: '{policy}' is unknown; use {', '.join(POLICIES)}")
    if policy == "crop":
        return _crop(width, height, tile_size)
    if policy not in ANYRES_POLICIES:
        return Tiling(1, 1, False, (tile_size, tile_size), (0, 0))
    if not grids:
        raise ConfigError(f"data.anyres_grids: data.image_policy={policy} needs at least one grid")
    ties = ties if policy == "anyres_stretch" else "first"
    columns, rows = best_grid((width, height), (tile_size, tile_size), grids, ties)
    canvas = (columns * tile_size, rows * tile_size)
    if policy == "anyres_stretch":
        return Tiling(columns, rows, True, canvas, (0, 0))
    resized = _fit(width, height, *canvas)
    offset = ((canvas[0] - resized[0]) // 2, (canvas[1] - resized[1]) // 2)
    return Tiling(columns, rows, True, resized, offset)


def tiling_of_image(
    who: str,
    width: int,
    height: int,
    *,
    policy: str,
    tile_size: int,
    grids: Sequence[Grid],
    max_pixels: int,
    ties: str = "aspect",
) -> Tiling:
    """Chooses the views of an image, or refuses one whose resizing would take too much memory.

    Few pixels are no protection: of an image of 65000 x 1, `crop` makes 25,000,000 x 384.

    Args:
        who: How messages name it.
        width: Pixels of the image, at least 1.
        height: Pixels of the image, at least 1.
        policy: As for `choose_tiling`.
        tile_size: As for `choose_tiling`.
        grids: As for `choose_tiling`.
        max_pixels: Most pixels of an image (setting data.max_image_pixels).
        ties: As for `choose_tiling`.

    Raises:
        ConfigError: As `choose_tiling`.
        DataError: One line that starts with `who`.
    """
    tiling = choose_tiling(
        width, height, policy=policy, tile_size=tile_size, grids=grids, ties=ties
    )
    wide, high = resized_between(width, height, tiling, policy, tile_size)
    most = max(max_pixels, _ALWAYS) * (_BANDS if policy == "pad" else 1)
    if wide * high > most:
        raise DataError(
            f"{who} is too thin: {width} x {height} pixels become {wide} x {high} while "
            f"data.image_policy={policy} resizes it, and data.max_image_pixels is {max_pixels}"
        )
    return tiling


def resized_between(
    width: int, height: int, tiling: Tiling, policy: str, tile_size: int
) -> tuple[int, int]:
    """Width and height of the largest picture between an image and its tiles.

    Images are resized along x, then along y (`dattn_mcore.data.resize`), so between the passes all
    rows are there. `pad` makes a square first.
    """
    if policy == "pad":
        return max(width, height), max(width, height)
    wide = max(tiling.resized[0], tile_size) if tiling.base_view else tiling.resized[0]
    return wide, max(height, tiling.resized[1])


def _fit(width: int, height: int, canvas_width: int, canvas_height: int) -> tuple[int, int]:
    """Width and height of the image inside the canvas, aspect ratio kept, rounded up."""
    scale_x, scale_y = canvas_width / width, canvas_height / height
    if scale_x < scale_y:
        return canvas_width, min(math.ceil(height * scale_x), canvas_height)
    return min(math.ceil(width * scale_y), canvas_width), canvas_height


def _crop(width: int, height: int, tile_size: int) -> Tiling:
    """Shortest edge to the tile's side, the middle cut out; CLIP's processor's own rounding."""
    long = int(tile_size * max(width, height) / min(width, height))
    resized = (tile_size, long) if width <= height else (long, tile_size)
    offset = (-((resized[0] - tile_size) // 2), -((resized[1] - tile_size) // 2))
    return Tiling(1, 1, False, resized, offset)
