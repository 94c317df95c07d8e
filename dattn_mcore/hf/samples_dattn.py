"""Images sample by sample: the form that stays right when generation repeats its inputs.

A batch's tiles stand one after the other in `pixel_values`, however many a sample has. Generation
repeats every tensor along its first axis, once for each beam, as if that were the samples'. So
for generation both tensors are given a first axis of samples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

IGNORED_LABEL = -100  # of PyTorch's cross entropy: no token is to be predicted here


def tiles_of(grids: Tensor) -> Tensor:
    """Tiles of images whose canvases are `grids` [..., 2]: a base view and the canvas."""
    return 1 + grids.prod(-1)


def by_sample(
    pixel_values: Tensor, image_grids: Tensor | None, counts: Tensor, skip: Tensor
) -> tuple[Tensor, Tensor]:
    """Gives each sample its own images.

    Args:
        pixel_values: tiles of all images [tiles, 3, height, width].
        image_grids: int64 [images, 2]; None: every tile is an image.
        counts: int64 [batch], images of each sample in `pixel_values`.
        skip: int64 [batch], how many of a sample's first images are left out.

    Returns:
        pixel_values [batch, most tiles, 3, height, width] and image_grids [batch, most images, 2],
        padded with zeros and with -1.

    Raises:
        ValueError: the tiles are not as many as the grids say.
    """
    if image_grids is None:
        image_grids = torch.zeros(len(pixel_values), 2, dtype=torch.long)
    image_grids = image_grids.cpu()
    check_tiles(pixel_values, image_grids)
    batch = len(counts)
    sizes = tiles_of(image_grids)
    if batch and not skip.any() and len(set(counts.tolist())) == 1 and len(sizes.unique()) == 1:
        return (  # as they lie: pixels are not copied
            pixel_values.unflatten(0, (batch, -1)),
            image_grids.unflatten(0, (batch, -1)).to(pixel_values.device),
        )
    tiles, grids = [], []
    first_tile = first = 0
    for count, left_out in zip(counts.tolist(), skip.tolist(), strict=True):
        sizes = tiles_of(image_grids[first : first + count])
        begin = first_tile + int(sizes[:left_out].sum())
        first_tile += int(sizes.sum())
        tiles.append(pixel_values[begin:first_tile])
        grids.append(image_grids[first + left_out : first + count])
        first += count
    return (
        pad_sequence(tiles, batch_first=True),
        pad_sequence(grids, batch_first=True, padding_value=-1).to(pixel_values.device),
    )


def one_after_another(
    pixel_values: Tensor, image_grids: Tensor | None, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """Undoes `by_sample`.

    Args:
        pixel_values: [batch, most tiles, 3, height, width].
        image_grids: int64 [batch, most images, 2].
        counts: int64 [batch], image placeholders of each sample.

    Returns:
        pixel_values [tiles, 3, height, width] and image_grids [images, 2].

    Raises:
        ValueError: the grids are missing, or a sample has not one image for each placeholder.
    """
    batch = counts.shape[0]
    if image_grids is None or image_grids.ndim != 3 or len(image_grids) != batch:
        raise ValueError(
            f"pixel_values have a first axis of samples, so image_grids must be [{batch}, most "
            "images, 2], with -1 where a sample has fewer"
        )
    real = image_grids[..., 0] >= 0
    if bool((real.sum(1) != counts.to(real.device)).any()):
        raise ValueError(
            f"input_ids hold {counts.tolist()} image placeholders a sample, but image_grids "
            f"{real.sum(1).tolist()} images; pass one image per placeholder"
        )
    sizes = (tiles_of(image_grids) * real).sum(1)
    place = torch.arange(pixel_values.shape[1], device=sizes.device)
    live = place < sizes[:, None]
    if bool(live.all()):  # no sample is padded: pixels are not copied
        return pixel_values.flatten(0, 1), image_grids[real]
    return pixel_values[live.to(pixel_values.device)], image_grids[real]


def check_pixels(pixel_values: Any) -> None:
    """Refuses pixels that are no tensor of tiles, in one row or sample by sample.

    Raises:
        ValueError: they are not.
    """
    if pixel_values is None or (isinstance(pixel_values, Tensor) and pixel_values.ndim in (4, 5)):
        return
    shape = getattr(pixel_values, "shape", None)
    found = type(pixel_values).__name__ if shape is None else f"of shape {list(shape)}"
    raise ValueError(
        f"pixel_values are {found}; they must be a tensor [tiles, 3, height, width], as the "
        'processor gives it with return_tensors="pt"'
    )


def check_tiles(pixel_values: Tensor, image_grids: Tensor) -> None:
    """Refuses tiles that are not as many as `image_grids` [images, 2] say.

    Raises:
        ValueError: they are not.
    """
    expected = int(tiles_of(image_grids).sum())
    if len(pixel_values) != expected:
        raise ValueError(
            f"pixel_values hold {len(pixel_values)} tiles, but image_grids name {expected} (a base "
            "view and columns x rows for each image); pass both as the processor gives them"
        )


__all__ = [
    "IGNORED_LABEL",
    "by_sample",
    "check_pixels",
    "check_tiles",
    "one_after_another",
    "tiles_of",
]
