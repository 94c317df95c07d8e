"""A decoded image to the tiles of its plan: resized, padded, cut.

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

from dattn_mcore.data.tiles import ANYRES_POLICIES, Grid, plan_tiles


def to_tiles(
    image: Tensor, size: int, policy: str, fill: Sequence[int], grids: Sequence[Grid] = ()
) -> Tensor:
    """Makes an image the tiles of its plan (`plan_tiles`).

    Args:
        image: uint8 [3, height, width].
        size: Side of a tile in pixels.
        policy: `anyres_stretch`, `anyres_letterbox`, or one of `to_tile`.
        fill: RGB of the borders of `pad`, 0..255.
        grids: (columns, rows) of the canvases that AnyRes may choose.

    Returns:
        uint8 [tiles, 3, size, size], contiguous: base view, then the canvas row by row.
    """
    if policy not in ANYRES_POLICIES:
        return to_tile(image, size, policy, fill)[None]
    height, width = image.shape[-2:]
    plan = plan_tiles(width, height, policy=policy, tile_size=size, grids=grids)
    (x, y), (wide, high) = plan.offset, plan.resized
    canvas = image.new_zeros(3, plan.rows * size, plan.columns * size)
    canvas[:, y : y + high, x : x + wide] = _resize(image, high, wide)
    cut = canvas.view(3, plan.rows, size, plan.columns, size).permute(1, 3, 0, 2, 4)
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
        plan = plan_tiles(width, height, policy=policy, tile_size=size, grids=())
        (wide, high), left, top = plan.resized, -plan.offset[0], -plan.offset[1]
        return _resize(image, high, wide)[:, top : top + size, left : left + size].contiguous()
    if policy == "pad" and height != width:
        side = max(height, width)
        top, left = (side - height) // 2, (side - width) // 2
        canvas = torch.tensor(fill, dtype=torch.uint8, device=image.device)
        canvas = canvas[:, None, None].repeat(1, side, side)
        canvas[:, top : top + height, left : left + width] = image
        image = canvas
    return _resize(image, size, size).contiguous()


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
