"""The cache of text and visual rows, and how it is found among what generation hands over."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from .layout_dattn import Rows
from .shared_images_dattn import SharedImages


class DattnCache(DynamicCache):
    """Keys and values of text columns and of visual rows, each computed once.

    Text keys are held by transformers' `DynamicLayer`s, one column per entry of `input_ids`.
    Sliding-window layers keep all columns as well: placeholders and padding are columns too, so a
    window counted in columns would drop keys that a window counted in positions still sees.

    Attributes:
        text_live: bool [batch, columns], True for real text rows.
        image_starts: bool [batch, columns], True for image placeholders.
        visual_live: bool [batch, visual rows], False for the padding of a batch.
        visual_image: int64 [batch, visual rows], which image of its sample a row belongs to.
        visual_keys: per layer [batch, kv heads, visual rows, head_dim]; rotated where
            t2v_position is rope, plain otherwise.
        visual_values: like `visual_keys`.
        shared: images of which there is one copy for the samples that show them, in place of
            visual rows of each sample; None: each sample has its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.text_live: Tensor | None = None
        self.image_starts: Tensor | None = None
        self.visual_live: Tensor | None = None
        self.visual_image: Tensor | None = None
        self.visual_keys: dict[int, Tensor] = {}
        self.visual_values: dict[int, Tensor] = {}
        self.shared: SharedImages | None = None

    def extend_rows(self, rows: Rows) -> Rows:
        """Appends (text_live, image_starts, visual_live, visual_image); returns all rows so far."""
        names = ("text_live", "image_starts", "visual_live", "visual_image")
        for name, new in zip(names, rows, strict=True):
            old = getattr(self, name)
            setattr(self, name, new if old is None else torch.cat([old, new], dim=1))
        text_live, image_starts, visual_live, visual_image = (getattr(self, n) for n in names)
        return text_live, image_starts, visual_live, visual_image

    def update_visual(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Appends a layer's new visual keys and values; returns all of that layer."""
        if layer in self.visual_keys:
            if keys.shape[2] == 0:
                return self.visual_keys[layer], self.visual_values[layer]
            keys = torch.cat([self.visual_keys[layer], keys], dim=2)
            values = torch.cat([self.visual_values[layer], values], dim=2)
        self.visual_keys[layer], self.visual_values[layer] = keys, values
        return keys, values

    def unshare(self) -> None:
        """Gives each sample its own visual rows, where there is one copy of them so far."""
        if self.shared is None:
            return
        assert self.text_live is not None  # a pass has gone before
        live, image_of_row, layers = self.shared.copies()
        self.visual_live = live.to(self.text_live.device)
        self.visual_image = image_of_row.to(self.text_live.device)
        for layer, (keys, values) in enumerate(layers):
            self.visual_keys[layer], self.visual_values[layer] = keys, values
        self.shared = None

    def map_samples(self, change: Callable[[Tensor], Tensor]) -> None:
        """Changes the first axis, that of samples, of everything beside the text's keys."""
        for name in ("text_live", "image_starts", "visual_live", "visual_image"):
            if getattr(self, name) is not None:
                setattr(self, name, change(getattr(self, name)))
        for store in (self.visual_keys, self.visual_values):
            for layer, tensor in store.items():
                store[layer] = change(tensor)
        if self.shared is not None:
            self.shared = self.shared.mapped(change)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorders the samples for beam search."""
        super().reorder_cache(beam_idx)
        self.map_samples(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sample `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self.map_samples(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the samples `indices`."""
        super().batch_select_indices(indices)
        self.map_samples(lambda x: x[_there(indices, x), ...])

    def crop(self, *args: int) -> None:
        """Removes the last text columns; see transformers for how many.

        Raises:
            ValueError: if an image's placeholder would be removed.
        """
        super().crop(*args)
        length = self.get_seq_length()
        if self.text_live is not None and self.image_starts is not None:
            if self.image_starts[:, length:].any():
                raise ValueError("cannot crop the cache across an image placeholder")
            self.text_live = self.text_live[:, :length]
            self.image_starts = self.image_starts[:, :length]

    def reset(self) -> None:
        """Empties the cache."""
        super().reset()
        self.text_live = self.image_starts = self.visual_live = self.visual_image = None
        self.visual_keys, self.visual_values = {}, {}
        self.shared = None


def _there(indices: Any, tensor: Tensor) -> Any:
    """Indices on the device of what they select from."""
    return indices.to(tensor.device) if isinstance(indices, Tensor) else indices


def is_cache(value: Any) -> bool:
    """Whether an argument is a cache, under whatever name it comes."""
    return isinstance(value, Cache)


def own_cache(given: Iterable[Any]) -> DattnCache | None:
    """The cache among the caches that a release hands over under its own names.

    `generate` makes a cache of transformers' own. While it is empty, a `DattnCache` takes its
    place, and the model's output says so: whoever calls goes on with that one.

    Args:
        given: caches; None are passed over.

    Raises:
        ValueError: there are several, or one of a kind that cannot hold visual rows.
    """
    caches = list({id(cache): cache for cache in given if cache is not None}.values())
    if len(caches) > 1:
        kinds = ", ".join(type(cache).__name__ for cache in caches)
        raise ValueError(f"there are {len(caches)} caches ({kinds}); pass one")
    if not caches:
        return None
    (cache,) = caches
    if isinstance(cache, DattnCache):
        return cache
    check_replaceable(cache)
    cache.dattn_replaced = True
    return DattnCache()


def check_replaceable(cache: Any) -> None:
    """Refuses caches that a `DattnCache` cannot take the place of.

    Raises:
        ValueError: another kind than an empty dynamic cache in the model's own memory.
    """
    kind = type(cache).__name__
    if type(cache) is not DynamicCache:
        reason = f"the cache is a {kind}"
    elif getattr(cache, "offloading", False):
        reason = f"the {kind} is offloaded"
    elif getattr(cache, "dattn_replaced", False):
        reason = f"this {kind} was replaced by the DattnCache in the model's output"
    elif cache.get_seq_length():
        reason = f"the {kind} was filled by another model"
    else:
        return
    raise ValueError(
        f"{reason}; this model keeps visual keys too: pass a DattnCache (the one in its last "
        "output, to go on with it) or no cache, and no cache_implementation"
    )


__all__ = ["DattnCache", "check_replaceable", "is_cache", "own_cache"]
