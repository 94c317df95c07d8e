"""A decoded image to its tiles: resized, padded, cut.

Resizing is torch's antialiased bicubic on uint8, which follows Pillow's within two grey levels
(DALI's own cubic resize is much further off). It works along x, then along y, as Pillow did up to
release 12; Pillow 13 starts with y where that is less work, and differs from both by more than two
levels in a few pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from dattn_mcore.data.tiles import ANYRES_POLICIES, Grid, choose_tiling
from dattn_mcore.parallel.out_of_memory import is_out_of_memory

_BAND = 4_000_000  # pixels of `pad`'s square that are made at once on a CPU
_MOST_ON_GPU = 100_000_000  # pixels of a square that is made whole on a GPU, in float32
# PyTorch's antialiased kernels keep an output pixel's weights in 48 KiB of a GPU's shared memory,
# and refuse where an image shrinks by so much that they do not fit.
_TOO_MANY_WEIGHTS = "Too much shared memory required"


def fits_no_gpu(error: Exception) -> bool:
    """Whether a resize that failed on a GPU does not fit it; else the GPU has failed."""
    return is_out_of_memory(error) or _TOO_MANY_WEIGHTS in str(error)


def to_tiles(
    image: Tensor,
    size: int,
    policy: str,
    fill: Sequence[int],
    grids: Sequence[Grid] = (),
    ties: str = "aspect",
) -> Tensor:
    """Cuts an image into its tiles (`choose_tiling`).

    Args:
        image: uint8 [3, height, width].
        size: Side of a tile in pixels.
        policy: `anyres_stretch`, `anyres_letterbox`, or one of `to_tile`.
        fill: RGB of the borders of `pad`, 0..255.
        grids: (columns, rows) of the canvases that AnyRes may choose.
        ties: Which of equally good canvases it takes.

    Returns:
        uint8 [tiles, 3, size, size], contiguous: base view, then the canvas row by row.
    """
    if policy not in ANYRES_POLICIES:
        return to_tile(image, size, policy, fill)[None]
    height, width = image.shape[-2:]
    tiling = choose_tiling(width, height, policy=policy, tile_size=size, grids=grids, ties=ties)
    (x, y), (wide, high) = tiling.offset, tiling.resized
    canvas = image.new_zeros(3, tiling.rows * size, tiling.columns * size)
    canvas[:, y : y + high, x : x + wide] = _resize(image, high, wide)
    cut = canvas.view(3, tiling.rows, size, tiling.columns, size).permute(1, 3, 0, 2, 4)
    return torch.cat([_resize(image, size, size)[None], cut.flatten(0, 1)]).contiguous()


def to_tile(image: Tensor, size: int, policy: str, fill: Sequence[int]) -> Tensor:
    """Makes an image a square of `size` pixels.

    stretch: resized to the square, aspect ratio lost (SigLIP's processor).
    pad: centred on a square of colour `fill`, then resized (LLaVA-1.5).
    crop: shortest edge resized to `size`, centre cut out (CLIP's processor, its own rounding).

    Args:
        image: uint8 [3, height, width].
        size: Side of the tile in pixels.
        policy: As above.
        fill: RGB of the borders, 0..255.

    Returns:
        uint8 [3, size, size], contiguous.
    """
    height, width = image.shape[-2:]
    if policy == "crop":
        tiling = choose_tiling(width, height, policy=policy, tile_size=size, grids=())
        (wide, high), left, top = tiling.resized, -tiling.offset[0], -tiling.offset[1]
        return _resize(image, high, wide)[:, top : top + size, left : left + size].contiguous()
    if policy == "pad" and height != width:
        return _padded(image, size, fill)
    return _resize(image, size, size).contiguous()


def _padded(image: Tensor, size: int, fill: Sequence[int]) -> Tensor:
    """Centred on a square of colour `fill`, then resized: `pad`.

    The square is never whole in memory: of a thin image it would be a thousand times the image.
    Bands of its rows are resized along x, what they become is resized along y, which is how the
    square itself is resized on a CPU, bit for bit.
    """
    height, width = image.shape[-2:]
    side = max(height, width)
    if side * side > _MOST_ON_GPU:
        image = image.cpu()
    colour = torch.tensor(fill, dtype=torch.uint8, device=image.device)[:, None, None]
    top, left = (side - height) // 2, (side - width) // 2
    at_once = side if image.device.type != "cpu" else max(_BAND // side, 1)
    bands = []
    for start in range(0, height, at_once):
        part = image[:, start : start + at_once]
        band = colour.repeat(1, part.shape[1], side)
        band[:, :, left : left + width] = part
        bands.append(band)
        if image.device.type == "cpu":
            bands[-1] = _resize(band, band.shape[1], size)
    border = _resize(colour.repeat(1, 1, side), 1, bands[0].shape[2])
    rows = [border.expand(-1, top, -1), *bands, border.expand(-1, side - height - top, -1)]
    return _resize(torch.cat(rows, 1), size, size).contiguous()


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    """Antialiased bicubic resize of uint8 [3, h, w]; the same size is a copy of nothing."""
    if image.shape[-2:] == (height, width):
        return image
    batch = image[None]
    if image.device.type == "cpu":
        # Channels-last uint8 takes torch's integer path, which is Pillow's algorithm.
        batch = batch.contiguous(memory_format=torch.channels_last)
        return functional.interpolate(
            batch, size=(height, width), mode="bicubic", antialias=True, align_corners=False
        )[0]
    resized = functional.interpolate(
        batch.float(), size=(height, width), mode="bicubic", antialias=True, align_corners=False
    )
    return resized.round_().clamp_(0, 255).to(torch.uint8)[0]
