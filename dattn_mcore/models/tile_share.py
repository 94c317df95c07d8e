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
        items: shape of each image and video; empty: every tile is an image of its own.
        side: patches of a tile in a row, and in a column.
        num_visual: visual rows of the whole pack, padding included; a multiple of `ranks`.
        rank: of the group that divides it.
        ranks: of that group.
    """
    here = num_visual // ranks
    source = stitched_order(num_tiles, items, side)
    rows = rows_of_tiles(num_tiles, items, side)
    tile_of = np.repeat(np.arange(num_tiles), rows)
    ends = np.array([tiles_of_rank(num_tiles, r, ranks).stop for r in range(ranks)])
    encodes = np.searchsorted(ends, tile_of[source], "right")
    carries = np.arange(len(source)) // here if here else source
    tiles = tiles_of_rank(num_tiles, rank, ranks)
    sent = np.flatnonzero(encodes == rank)
    got = np.flatnonzero(carries == rank)
    got = got[np.argsort(encodes[got], kind="stable")]
    return TileShare(
        tiles=tiles,
        send=torch.from_numpy(source[sent] - int(rows[: tiles.start].sum())),
        send_counts=tuple(np.bincount(carries[sent], minlength=ranks).tolist()),
        receive_counts=tuple(np.bincount(encodes[got], minlength=ranks).tolist()),
        place=torch.from_numpy(got - rank * here),
        num_visual=here,
    )


def stitched_order(num_tiles: int, items: Sequence[VisualShape], side: int) -> np.ndarray:
    """int64 [visual rows]: of each visual row its number among rows that go tile by tile.

    The rows of a canvas go line by line over its whole width, those of a video frame by frame.

    Args:
        num_tiles: of all images.
        items: shape of each image and video; an image's base view comes first, then the tiles of
            its canvas, row by row. Empty: every tile is an image of its own.
        side: patches of an image's tile in a row, and in a column.
    """
    order = np.arange(rows_of_tiles(num_tiles, items, side).sum(), dtype=np.int64)
    if not any(item.grid[0] for item in items):
        return order
    views, first, per_tile = [], 0, side * side
    for item in items:
        columns, rows = item.grid
        if item.times:
            views.append(order[first : first + len(item.times) * item.frame_side**2])
        else:
            views.append(order[first : first + per_tile])
            canvas = order[first + per_tile : first + (1 + rows * columns) * per_tile]
            canvas = canvas.reshape(rows, columns, side, side).transpose(0, 2, 1, 3)
            views.append(canvas.reshape(-1))
        first += sum(map(len, views[-1:] if item.times else views[-2:]))
    return np.concatenate(views)


def rows_of_tiles(num_tiles: int, items: Sequence[VisualShape], side: int) -> np.ndarray:
    """int64 [tiles]: visual rows of each; see `stitched_order`."""
    if not items:
        return np.full(num_tiles, side * side, np.int64)
    each = [item.frame_side**2 if item.times else side * side for item in items]
    return np.repeat(np.array(each, np.int64), [item.num_tiles for item in items])


@dataclass(frozen=True)
class TilePlace:
    """Where a tile stands.

    Attributes:
        grid: canvas that it is part of; (0, 0): it is a base view, or a frame.
        number: in the canvas, or of the frame in its video.
        video: that it is a frame of; None: an image.
    """

    grid: Grid = (0, 0)
    number: int = 0
    video: VisualShape | None = None


def places_of(num_tiles: int, items: Sequence[VisualShape]) -> list[TilePlace]:
    """Of each tile; see `stitched_order`."""
    if not items:
        return [TilePlace()] * num_tiles
    places: list[TilePlace] = []
    for item in items:
        if item.times:
            places += [TilePlace(number=number, video=item) for number in range(len(item.times))]
            continue
        places.append(TilePlace())
        columns, rows = item.grid
        places += [TilePlace(grid=item.grid, number=number) for number in range(columns * rows)]
    return places
