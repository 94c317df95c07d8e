"""Which samples of an index show the same images, for all of them at once."""

from __future__ import annotations

import numpy as np

from dattn_mcore.data.index.store import Index

# Constants of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators).
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def image_sets(index: Index) -> np.ndarray:
    """A number for each sample, equal where samples show the same images in the same order.

    A sample of text alone has one of its own. The numbers are 64 bits of a hash: enough to keep
    samples next to each other; whether rows are shared is decided by the images themselves.

    Args:
        index: Of the samples.

    Returns:
        uint64 [samples].
    """
    sets = _mixed(~np.arange(len(index), dtype=np.uint64))
    counts = index.samples["num_images"].astype(np.int64)
    shown = np.flatnonzero(counts)
    if not len(shown):
        return sets
    firsts, counts = index.samples["first_image"][shown].astype(np.int64), counts[shown]
    before = np.cumsum(counts) - counts
    places = np.arange(counts.sum()) - np.repeat(before, counts)  # of an image in its sample
    images = index.images["identity"][np.repeat(firsts, counts) + places]
    sets[shown] = np.add.reduceat(_mixed(images + places.astype(np.uint64) * _GOLDEN), before)
    return sets


def without_copies(sets: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The sets of drawn samples, where the second time that a sample is drawn is a set apart.

    An epoch that shows a sample twice shows it in two groups.

    Args:
        sets: From `image_sets`.
        numbers: int64 [drawn], of samples.

    Returns:
        uint64 [drawn].
    """
    order = np.argsort(numbers, kind="stable")
    ranked = numbers[order]
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
    times = np.empty(len(numbers), np.uint64)
    lengths = np.diff(np.r_[starts, len(ranked)])
    times[order] = np.arange(len(ranked)) - np.repeat(starts, lengths)
    return _mixed(sets[numbers] + times * _SECOND) if times.any() else sets[numbers]


def _mixed(values: np.ndarray) -> np.ndarray:
    """SplitMix64's output function: neighbours become far apart. Sums wrap around, as they must."""
    values = values + _GOLDEN
    values = (values ^ (values >> np.uint64(30))) * _FIRST
    values = (values ^ (values >> np.uint64(27))) * _SECOND
    return values ^ (values >> np.uint64(31))
