"""Who sees what among the rows of a pack, and among those that a rank has of it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Block:
    """Text rows [text_start, text_stop) that see visual rows [visual_start, visual_stop).

    The text rows are of one sample; the visual rows may be of any, and of several blocks.
    """

    text_start: int
    text_stop: int
    visual_start: int
    visual_stop: int


@dataclass(frozen=True)
class CausalChunk:
    """Consecutive query rows that see keys causally: the last all of them, each before one less.

    Attributes:
        q_start, q_stop: rows among those of the rank.
        k_start, k_stop: rows of the whole pack; as many at least as query rows.
    """

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int

    @property
    def rows(self) -> int:
        """Query rows."""
        return self.q_stop - self.q_start


@dataclass(frozen=True)
class ContextRows:
    """What a rank's text rows need of a pack whose rows are divided.

    Attributes:
        ranks: of the group.
        num_visual, num_text: rows of the whole pack, padding included.
        text_lengths: text rows of each sample of the whole pack.
        text_positions: int64 [num_text], positions of the whole pack's text rows.
        order: int64 [num_text], the pack's row in the place of each gathered row: those of rank 0,
            of rank 1, and so on.
        place: int64 [num_text], its inverse.
        blocks: what the whole pack's text rows see of this rank's visual rows (numbered here).
        chunks: what this rank's text rows see of the whole pack's.
    """

    ranks: int
    num_visual: int
    num_text: int
    text_lengths: tuple[int, ...]
    text_positions: torch.Tensor
    order: torch.Tensor
    place: torch.Tensor
    blocks: tuple[Block, ...]
    chunks: tuple[CausalChunk, ...]


def check_blocks(blocks: Sequence[Block]) -> None:
    """Checks that no text row sees a visual row twice.

    Runs of text rows must be the same or have no row in common; visual rows of the blocks of one
    run must not overlap, or they would count twice in its softmax.

    Raises:
        ValueError: names the two blocks.
    """
    rows = [(b.text_start, b.text_stop, b.visual_start, b.visual_stop) for b in blocks]
    for first, second in itertools.pairwise(sorted(rows)):
        apart = first[1] <= second[0]
        one_run = first[:2] == second[:2]
        if not apart and not (one_run and first[3] <= second[2]):
            raise ValueError(f"{Block(*first)} and {Block(*second)} overlap")
