"""From patch features to the visual rows of the language model.

Video: a frame is a tile, whose features may be shrunk to a coarser grid; its place in time is added
to its rows.

AnyRes: the tiles of an image's canvas are stitched into one grid before positions are added, so
that a position says where on the canvas a row stands; the base view comes first, with its own.

Two-layer MLP, RMSNorm, row and column positions, and a final RMSNorm whose weight sets how large
visual rows are beside text embeddings. Source: the released D-Attn successor (Vidi), whose visual
rows are built this way; T2V attention itself carries no positions, so they must be in the rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule

from dattn_mcore.architectures.sizes import ModelConfig
from dattn_mcore.layers.norm import Norm
from dattn_mcore.layers.parts import LOCAL_PARTS
from dattn_mcore.layers.runtime import Runtime
from dattn_mcore.models.pooling import shrink
from dattn_mcore.models.positions import AxisPosition, GridTable, time_indices
from dattn_mcore.models.tile_share import TilePlace, places_of, stitched_order
from dattn_mcore.models.transformer_configs import projector_transformer_config
from dattn_mcore.types import VisualShape


class Projector(MegatronModule):
    """Patch features [tiles, patches, vision hidden] to visual rows [tiles * patches, hidden].

    The MLP is tensor parallel (column, then row); everything else is replicated, and so is the
    output.

    Args:
        model: sizes of the projector and of what it connects.
        runtime: how it is computed.
        pg_collection: process groups; `tp` is used.
    """

    def __init__(
        self, model: ModelConfig, runtime: Runtime, pg_collection: ProcessGroupCollection
    ) -> None:
        tp_size = pg_collection.tp.size()
        transformer_config = projector_transformer_config(model, runtime, tp_size=tp_size)
        super().__init__(config=transformer_config)
        self.tp_group = pg_collection.tp
        projector, hidden = model.projector, model.llm.hidden_size
        self.grid = model.vision.grid_size
        self.output_norm_init = projector.output_norm_init
        self.mlp = MLP(
            transformer_config,
            MLPSubmodules(linear_fc1=LOCAL_PARTS.column, linear_fc2=LOCAL_PARTS.row),
            input_size=model.vision.hidden_size,
            ffn_hidden_size=projector.ffn_hidden_size,
            tp_group=pg_collection.tp,
        )
        self.norm = Norm(transformer_config, hidden, projector.norm_eps)
        self.row_position = self.column_position = None
        if model.visual_positions:
            self.row_position = AxisPosition(hidden, self.grid, projector.norm_eps)
            self.column_position = AxisPosition(hidden, self.grid, projector.norm_eps)
        self.time_position, self.video = None, model.video
        if model.time_positions:
            self.time_position = AxisPosition(hidden, model.video.time_entries, projector.norm_eps)
        self.output_norm = Norm(transformer_config, hidden, projector.norm_eps)

    def forward(
        self,
        features: torch.Tensor,
        items: Sequence[VisualShape] = (),
        tiles: range | None = None,
    ) -> torch.Tensor:
        """Projects features of whole tiles; see the class.

        Args:
            features: [tiles, patches, vision hidden], patches row by row; of each image the base
                view first, then the tiles of its canvas row by row.
            items: shape of each image and video; empty: every tile is an image of its own.
            tiles: which of the images' tiles `features` has; None: all of them.

        Returns:
            [rows, hidden]; of each image the rows of its base view, then those of its stitched
            canvas, both row by row; of a video those of its frames. Where `tiles` is given they go
            tile after tile instead (`tile_share.stitched_order` is what they must be put into).
        """
        places = places_of(len(features), items)
        if tiles is not None and items:
            places = places[tiles.start : tiles.stop]
        x, bias = self.mlp(self._cells(features, places))
        x = self.norm(x + bias)
        if any(item.grid[0] or item.times for item in items):
            x = x.flatten(0, 1) + self._positions_of(places, x.dtype)
        else:
            x = (x + self._positions(self.grid, self.grid, x.dtype)).flatten(0, 1)
        x = x + self._times_of(places, x.dtype)
        if tiles is None and any(item.grid[0] for item in items):
            order = stitched_order(len(features), items, self.grid)
            x = x[torch.from_numpy(order).to(x.device)]
        return self.output_norm(x)

    def _cells(self, features: torch.Tensor, places: Sequence[TilePlace]) -> torch.Tensor:
        """Features of the cells that become rows, [tiles, cells, width] or [1, cells, width]."""
        sides = [self._side(place) for place in places]
        if all(side == self.grid for side in sides):
            return features
        parts, first = [], 0
        for side, run in itertools.groupby(sides):
            end = first + len(list(run))
            parts.append(shrink(features[first:end], side).flatten(0, 1))
            first = end
        return torch.cat(parts)[None]

    def _side(self, place: TilePlace) -> int:
        return self.grid if place.video is None else place.video.frame_side

    def _positions_of(
        self, places: Sequence[TilePlace], dtype: torch.dtype
    ) -> torch.Tensor | float:
        """What is added to the rows of tiles, [rows, hidden], tile after tile; 0 without."""
        if self.row_position is None:
            return 0.0
        table = GridTable(places, self.grid)
        parts = [self._positions(rows, columns, dtype) for rows, columns in table.grids]
        whole = torch.cat([part for part in parts if isinstance(part, torch.Tensor)])
        return whole[torch.from_numpy(table.index).to(whole.device)]

    def _times_of(self, places: Sequence[TilePlace], dtype: torch.dtype) -> torch.Tensor | float:
        """What is added to the rows of frames, and nothing to those of images; 0 without.

        Packs of images alone go through it too: gradients that are reduced as they come must come
        on every rank.
        """
        if self.time_position is None:
            return 0.0
        videos = list(dict.fromkeys(place.video for place in places if place.video is not None))
        indices = [time_indices(video, self.video) for video in videos]
        starts = np.cumsum([1, *map(len, indices)])
        first = dict(zip(videos, starts.tolist(), strict=False))
        which = [0 if p.video is None else first[p.video] + p.number for p in places]
        rows = torch.from_numpy(np.repeat(which, [self._side(place) ** 2 for place in places]))
        device = self.output_norm.weight.device
        index = torch.from_numpy(np.concatenate(indices or [np.zeros(1, np.float32)])).to(device)
        times = self.time_position.at(index).to(dtype)
        return torch.cat([torch.zeros_like(times[:1]), times])[rows.to(device)]

    def _positions(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor | float:
        """[rows * columns, hidden], what is added to the rows of a grid; 0 without positions."""
        if self.row_position is None or self.column_position is None:
            return 0.0
        place = self.row_position(rows)[:, None] + self.column_position(columns)[None, :]
        return place.flatten(0, 1).to(dtype)
