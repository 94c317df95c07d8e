"""Visual keys and values of images, kept by content and used again in any conversation.

In D-Attn's own mode (v2v diagonal, t2v_position none) an image's visual rows depend on its pixels
alone: not on the text, on other images, or on where it is shown. So its keys and values in all
layers are computed once, and every later question about it starts with its text rows.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .cache_dattn import DattnCache
from .samples_dattn import check_tiles, tiles_of
from .shared_images_dattn import ImageRows, no_images
from .visual_dattn import place_rows

DEFAULT_BYTES = 4 * 2**30
_SAMPLED = 1024  # numbers of an image that are looked at first, or up to twice as many


class DattnImageCache:
    """Images' keys and values, the least recently used dropped first.

    Give it to every call: `model.generate(**inputs, image_cache=cache)`. Each image is computed by
    itself, so that an answer does not depend on what the cache holds. An image is found again by
    its pixels, dtype and grid. The cache empties itself when the model is another one, or its
    weights, adapters, hooks or device have changed. A change of a few single numbers through
    `.data`, which PyTorch itself does not count, needs `clear()`.

    Args:
        max_bytes: how much memory the images may take, on the devices of the model's layers; one
            that is larger by itself is computed each time.

    Attributes:
        hits: images shown that were not computed, repeated ones of a batch included.
        misses: images computed.
        nbytes: memory taken now.
        held: the images, the least recently used first.
        state: of the model that computed them.
    """

    def __init__(self, max_bytes: int = DEFAULT_BYTES) -> None:
        if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 0:
            raise ValueError(f"max_bytes is {max_bytes!r}; it must be a number of bytes, 0 or more")
        self.max_bytes = max_bytes
        self.hits = self.misses = self.nbytes = 0
        self.held: OrderedDict[Any, ImageRows] = OrderedDict()
        self.state: tuple[Any, ...] = ()

    def __len__(self) -> int:
        """Images held."""
        return len(self.held)

    def __deepcopy__(self, memo: Any) -> DattnImageCache:
        """An empty one: generation copies its arguments for an assistant, another model."""
        return DattnImageCache(self.max_bytes)

    def clear(self) -> None:
        """Drops all images; the counts of hits and misses stay."""
        self.held.clear()
        self.nbytes = 0

    def images(
        self, model: Any, pixel_values: Tensor, image_grids: Tensor | None, like: Tensor
    ) -> list[ImageRows]:
        """Keys and values of each image, computed where they are not held.

        Args:
            model: the `DattnModel` that computes them.
            pixel_values: tiles [tiles, 3, height, width] in the model's dtype.
            image_grids: int64 [images, 2]; None: every tile is an image.
            like: tensor whose dtype and device an image's rows take before the first layer.

        Raises:
            ValueError: the model cannot use a cache, or the tiles are not as many as the grids say.
        """
        check_cacheable(model)
        if image_grids is None:
            image_grids = torch.zeros(len(pixel_values), 2, dtype=torch.long)
        image_grids = image_grids.cpu()
        check_tiles(pixel_values, image_grids)
        state = model.visual_state()
        if state != self.state:
            self.clear()
            self.state = state
        tiles = pixel_values.split(tiles_of(image_grids).tolist())
        shown = alike(tiles, image_grids)
        found = {
            first: self._image(model, tiles[first], image_grids[first], like)
            for first in dict.fromkeys(shown)
        }
        self.hits += len(shown) - len(found)
        return [found[first] for first in shown]

    def _image(self, model: Any, tiles: Tensor, grid: Tensor, like: Tensor) -> ImageRows:
        key = (content(tiles), tuple(grid.tolist()), like.dtype)
        if key in self.held:
            self.held.move_to_end(key)
            self.hits += 1
            return self.held[key]
        self.misses += 1
        image = compute_image(model, tiles, grid, like)
        if image.nbytes <= self.max_bytes:
            while self.nbytes + image.nbytes > self.max_bytes:
                self.nbytes -= self.held.popitem(last=False)[1].nbytes
            self.held[key] = image
            self.nbytes += image.nbytes
        return image


def check_cacheable(model: Any) -> None:
    """Refuses models and moments in which an image's rows depend on more than its pixels.

    Raises:
        ValueError: the mode is a baseline's, the model trains, or gradients are wanted.
    """
    problem = mode_problem(model.config)
    if problem:
        raise ValueError(f"image_cache: {problem}; leave image_cache out")
    if model.training:
        raise ValueError("image_cache: the model is in training mode; call model.eval() first")
    if torch.is_grad_enabled():
        raise ValueError(
            "image_cache keeps no gradients of visual rows; call the model under torch.no_grad(), "
            "as generate does, or leave image_cache out"
        )


def mode_problem(config: Any) -> str:
    """Why images cannot be cached in a model's mode; empty where they can."""
    if config.v2v != "diagonal":
        return f"v2v is {config.v2v!r}, so an image's rows depend on the images before it"
    if config.t2v_position != "none":
        return f"t2v_position is {config.t2v_position!r}, so an image's keys depend on its place"
    return ""


def compute_image(model: Any, tiles: Tensor, grid: Tensor, like: Tensor) -> ImageRows:
    """Carries one image's visual rows through all layers, without text.

    Args:
        model: a `DattnModel`.
        tiles: [tiles, 3, height, width].
        grid: int64 [2], columns and rows of its canvas in tiles.
        like: tensor whose dtype and device the rows take.
    """
    (rows,) = model.get_image_features(tiles, grid[None])
    rows = rows.to(like)[None]
    count = rows.shape[1]
    no_column = torch.zeros(1, 0, dtype=torch.bool, device=rows.device)
    live = torch.ones(1, count, dtype=torch.bool, device=rows.device)
    place = (no_column, no_column, live, torch.zeros_like(live, dtype=torch.long))
    held = DattnCache()
    model.language_model(rows[:, :0], rows, place, held)
    layers = range(len(model.language_model.layers))
    return ImageRows(
        keys=tuple(held.visual_keys[n][0].transpose(0, 1).contiguous() for n in layers),
        values=tuple(held.visual_values[n][0].transpose(0, 1).contiguous() for n in layers),
    )


def hold_images(
    cache: DattnCache, images: Sequence[ImageRows], counts: Tensor, images_before: Tensor | int
) -> tuple[Tensor, Tensor]:
    """Appends images' keys and values to a conversation's cache, in all layers.

    Where the samples show few different lists of images, the cache gets one copy of each.

    Args:
        cache: extended in place.
        images: in order of samples, one at least; the same image is the same object.
        counts: int64 [batch], images of each sample; they sum to the number of images.
        images_before: int64 [batch], images that each sample's cache holds; or 0.

    Returns:
        The visual rows that each sample has got for itself, none where there is one copy: which
        are real, bool [batch, rows], and the image of its sample that each belongs to, int64.
    """
    if cache.visual_live is None or not cache.visual_live.shape[1]:
        held = no_images(len(counts)) if cache.shared is None else cache.shared
        shared = held.extended(images, counts.tolist())
        if shared.worthwhile:
            cache.shared = shared
            return place_rows([], torch.zeros_like(counts), 0, counts.device)
    cache.unshare()
    own = no_images(len(counts)).extended(images, counts.tolist())
    for layer, (keys, values) in enumerate(own.copies()[2]):
        cache.update_visual(keys, values, layer)
    lengths = [len(image) for image in images]
    return place_rows(lengths, counts, images_before, counts.device)


def alike(tiles: Sequence[Tensor], grids: Tensor) -> list[int]:
    """Of each image the number of the first one that is the same, itself included.

    Some of their numbers tell most images apart; those that agree in these are compared whole,
    where they lie, which costs less than a hash of each.

    Args:
        tiles: of each image [tiles, 3, height, width].
        grids: int64 [images, 2].
    """
    spreads = [t.reshape(-1)[:: max(1, t.numel() // _SAMPLED)] for t in tiles]
    numbers = torch.cat(spreads).cpu().split([len(spread) for spread in spreads])
    known: dict[Any, list[int]] = {}
    shown = []
    for number, (image, grid, some) in enumerate(zip(tiles, grids.tolist(), numbers, strict=True)):
        key = (tuple(grid), some.view(torch.uint8).numpy().tobytes())
        before = known.setdefault(key, [])
        same = next((n for n in before if torch.equal(tiles[n], image)), None)
        if same is None:
            before.append(number)
        shown.append(number if same is None else same)
    return shown


def content(tensor: Tensor) -> bytes:
    """A hash of a tensor's numbers, dtype and shape."""
    data = tensor.detach().contiguous().cpu().view(torch.uint8).numpy().data
    about = f"{tensor.dtype} {list(tensor.shape)}".encode()
    return hashlib.blake2b(data, digest_size=20, key=hashlib.sha256(about).digest()).digest()


__all__ = [
    "DEFAULT_BYTES",
    "DattnImageCache",
    "ImageRows",
    "check_cacheable",
    "hold_images",
    "mode_problem",
]
