"""Positions of visual rows: on their grid, and in time.

Text reads visual rows without positions of its own (T2V), so they must be in the rows. Source: the
released D-Attn successor (Vidi), whose visual rows get them this way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dattn_mcore.architectures.sizes import VideoConfig
from dattn_mcore.models.tile_share import TilePlace
from dattn_mcore.types import VisualShape


class AxisPosition(nn.Module):
    """Position embedding of one axis: sinusoid, float32 Linear-GELU-Linear, RMS-normalised.

    Args:
        hidden_size: width of a row; even.
        entries: positions the axis has at training resolution. An axis of another length is
            rescaled to 0 .. entries - 1, so that indices become fractional.
        eps: of the normalisation.
    """

    def __init__(self, hidden_size: int, entries: int, eps: float) -> None:
        super().__init__()
        self.hidden_size, self.entries, self.eps = hidden_size, entries, eps
        self.fc1 = nn.Linear(hidden_size, hidden_size, dtype=torch.float32)
        self.fc2 = nn.Linear(hidden_size, hidden_size, dtype=torch.float32)

    def forward(self, length: int) -> torch.Tensor:
        """Returns float32 [length, hidden_size]."""
        index = torch.arange(length, device=self.fc1.weight.device, dtype=torch.float32)
        return self.at(index * ((self.entries - 1) / max(length - 1, 1)))

    def at(self, index: torch.Tensor) -> torch.Tensor:
        """Embeds positions, float32 [n], whole or not; returns float32 [n, hidden_size]."""
        half = self.hidden_size // 2
        exponent = torch.arange(half, device=index.device, dtype=torch.float32) / half
        angles = torch.outer(index, torch.exp(-math.log(10000.0) * exponent))
        y = self.fc2(F.gelu(self.fc1(torch.cat([angles.sin(), angles.cos()], dim=1))))
        return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)


class GridTable:
    """Where the rows of each kind of tile stand in a table of positions.

    Args:
        places: of the tiles.
        side: patches of an image's tile in a row, and in a column.
    """

    def __init__(self, places: Sequence[TilePlace], side: int) -> None:
        self.side = side
        self._first: dict[tuple[int, int], int] = {}
        self.grids: list[tuple[int, int]] = []  # rows and columns of each part of the table
        length, index = 0, []
        for place in places:
            rows, columns = self._cells(place)
            if (rows, columns) not in self._first:
                self._first[rows, columns] = length
                self.grids.append((rows, columns))
                length += rows * columns
            index.append(self._first[rows, columns] + self._inside(place, rows, columns))
        self.index = np.concatenate(index) if index else np.zeros(0, np.int64)

    def _cells(self, place: TilePlace) -> tuple[int, int]:
        if place.video is not None:
            return place.video.frame_side, place.video.frame_side
        columns, rows = place.grid
        return self.side * max(rows, 1), self.side * max(columns, 1)

    def _inside(self, place: TilePlace, rows: int, columns: int) -> np.ndarray:
        """Numbers of a tile's cells in its grid."""
        cells = np.arange(rows * columns).reshape(rows, columns)
        if not place.grid[0]:
            return cells.reshape(-1)
        top = place.number // place.grid[0] * self.side
        left = place.number % place.grid[0] * self.side
        return cells[top : top + self.side, left : left + self.side].reshape(-1)


def time_indices(video: VisualShape, config: VideoConfig) -> np.ndarray:
    """Position of each frame on the axis of time, float32 [frames].

    Args:
        video: its frames.
        config: `time_axis`: from 0 to `time_entries` - 1 over the frames, or their seconds.
    """
    if config.time_axis == "seconds":
        return np.array(video.times, np.float32)
    frames = len(video.times)
    return np.arange(frames, dtype=np.float32) * (config.time_entries - 1) / max(frames - 1, 1)
