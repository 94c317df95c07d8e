"""Questions about the same images side by side: in a process, and in a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from typing import Protocol

from PIL import Image

from dattn_mcore.hf.image_rules_dattn import ORIENTATION


class Shows(Protocol):
    """A picture, as far as grouping needs it."""

    @property
    def key(self) -> Hashable:
        """The same for the same image."""


Key = tuple[Hashable, ...]  # of the pictures of a question; empty: it shows none


def key_of(pictures: Sequence[Shows]) -> Key:
    """What questions about the same images, in the same order, have in common."""
    return tuple(picture.key for picture in pictures)


def content_key(image: Image.Image) -> Hashable:
    """The key of an image that is decoded already and has no name.

    Of what its colours and its transparency depend on: pixels can be numbers in a palette.
    """
    digest = hashlib.blake2b(image.tobytes(), digest_size=20)
    palette = image.palette
    more = (
        None if palette is None else (palette.mode, bytes(palette.palette)),
        image.info.get("transparency"),
        image.getexif().get(ORIENTATION),
    )
    digest.update(repr(more).encode())
    return image.mode, image.size, digest.digest()


def order_by_image(keys: Sequence[Key], lengths: Sequence[int]) -> list[int]:
    """Numbers of questions, those about the same images one after the other.

    Groups with most images come first, of these the one with the longest prompt, and within a
    group the longest prompt: memory runs out at once or never. Questions without images are one
    group, the last.

    Args:
        keys: of each question.
        lengths: of each question's prompt.
    """
    longest: dict[Key, int] = {}
    first: dict[Key, int] = {}
    for number, (key, length) in enumerate(zip(keys, lengths, strict=True)):
        longest[key] = max(length, longest.get(key, 0))
        first.setdefault(key, number)
    return sorted(
        range(len(keys)),
        key=lambda n: (-len(keys[n]), -longest[keys[n]], first[keys[n]], -lengths[n]),
    )


def share_of_rank(keys: Sequence[Key], rank: int, size: int) -> list[int]:
    """Numbers of the questions that a process answers; images stay together.

    Groups stand in the order of their first questions and are cut into shares of about the same
    number of questions: a group belongs to the share in which its middle lies. A question without
    images is a group of its own. The shares do not depend on what is answered already.

    Args:
        keys: of each question.
        rank: which process.
        size: how many there are.
    """
    groups: dict[Hashable, list[int]] = {}
    for number, key in enumerate(keys):
        groups.setdefault(key or number, []).append(number)
    mine: list[int] = []
    before = 0
    for group in groups.values():
        # The share of the middle question, in whole numbers; of two middle ones the first.
        middle = before + (len(group) - 1) // 2
        before += len(group)
        if middle * size // len(keys) == rank:
            mine += group
    return sorted(mine)
