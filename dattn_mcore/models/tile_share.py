"""Tiles over the ranks that divide a pack: who encodes which, and where their rows go.

Each rank encodes consecutive tiles. Then one exchange deals their rows to the ranks that carry them
through the layers: as many to each, in the order of the pack's visual rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import tensor_parallel

from dattn_mcore.types import VisualShape, tiles_of_rank

Grid = tuple[int, int]  # columns and rows of an image's canvas in tiles; (0, 0) for one tile


@dataclass(frozen=True)
class TileShare:
    """A rank's share of the tiles of a pack.

    Attributes:
        tiles: numbers of the tiles that it encodes; may be empty.
        send: int64 [rows of these tiles], tile after tile, in the order in which they are sent.
        send_counts, receive_counts: rows that go to each rank, and that come from it.
        place: int64 [received rows], which of this rank's visual rows each is.
        num_visual: visual rows of this rank, padding included.
    """

    tiles: range
    send: torch.Tensor
    send_counts: tuple[int, ...]
    receive_counts: tuple[int, ...]
    place: torch.Tensor
    num_visual: int

    def to(self, device: torch.device) -> TileShare:
        """The same, with its index tensors on a device."""
        return TileShare(
            tiles=self.tiles,
            send=self.send.to(device, non_blocking=True),
            send_counts=self.send_counts,
            receive_counts=self.receive_counts,
            place=self.place.to(device, non_blocking=True),
            num_visual=self.num_visual,
        )

    def exchange(self, rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        """From rows of this rank's tiles to this rank's visual rows; differentiable.

        Args:
            rows: [rows of its tiles, 1, hidden], tile after tile.
            group: ranks that share the pack.

        Returns:
            [num_visual, 1, hidden]; padding rows are zero.
        """
        received = tensor_parallel.all_to_all(
            group, rows[self.send], list(self.receive_counts), list(self.send_counts)
        )
        whole = rows.new_zeros(self.num_visual, *rows.shape[1:])
        return whole.index_copy(0, self.place, received)


def share_tiles(
    *,
    num_tiles: int,
    items: Sequence[VisualShape],
    side: int,
    num_visual: int,
    rank: int,
    ranks: int,
) -> TileShare:
    """Works out a rank's share of a pack's tiles, on the host.

    Args:
        num_tiles: of the whole pack.
        items: shape of each image; empty: every tile is an image of its own.
        side: patches of a tile in a row, and in a column.
        num_visual: visual rows of the whole pack, padding included; a multiple of `ranks`.
        rank: of the group that divides it.
        ranks: of that group.
    """
    per_tile, here = side * side, num_visual // ranks
    source = stitched_order(num_tiles, items, side)
    ends = np.array([tiles_of_rank(num_tiles, r, ranks).stop for r in range(ranks)])
    encodes = np.searchsorted(ends, source // per_tile, "right")
    carries = np.arange(len(source)) // here if here else source
    tiles = tiles_of_rank(num_tiles, rank, ranks)
    sent = np.flatnonzero(encodes == rank)
    got = np.flatnonzero(carries == rank)
    got = got[np.argsort(encodes[got], kind="stable")]
    return TileShare(
        tiles=tiles,
        send=torch.from_numpy(source[sent] - tiles.start * per_tile),
        send_counts=tuple(np.bincount(carries[sent], minlength=ranks).tolist()),
        receive_counts=tuple(np.bincount(encodes[got], minlength=ranks).tolist()),
        place=torch.from_numpy(got - rank * here),
        num_visual=here,
    )


def stitched_order(num_tiles: int, items: Sequence[VisualShape], side: int) -> np.ndarray:
    """int64 [tiles * side * side]: of each visual row its number among rows that go tile by tile.

    The rows of a canvas go line by line over its whole width.

    Args:
        num_tiles: of all images.
        items: shape of each image; the base view's tile comes first, then those of the canvas, row
            by row. Empty: every tile is an image of its own.
        side: patches of a tile in a row, and in a column.
    """
    order = np.arange(num_tiles * side * side, dtype=np.int64).reshape(num_tiles, side, side)
    if not any(item.grid[0] for item in items):
        return order.reshape(-1)
    views, first = [], 0
    for columns, rows in (item.grid for item in items):
        views.append(order[first].reshape(-1))
        first += 1
        canvas = order[first : first + rows * columns]
        first += rows * columns
        canvas = canvas.reshape(rows, columns, side, side).transpose(0, 2, 1, 3)
        views.append(canvas.reshape(-1))
    return np.concatenate(views)


def places_of(num_tiles: int, items: Sequence[VisualShape]) -> list[tuple[Grid, int]]:
    """Of each tile the canvas it is part of, and its number in it; ((0, 0), 0) for a base view."""
    if not items:
        return [((0, 0), 0)] * num_tiles
    places: list[tuple[Grid, int]] = []
    for columns, rows in (item.grid for item in items):
        places.append(((0, 0), 0))
        places += [((columns, rows), number) for number in range(columns * rows)]
    return places
