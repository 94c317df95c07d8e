"""From patch features to the visual rows of the language model.

AnyRes: the tiles of an image's canvas are stitched into one grid before positions are added, so
that a position says where on the canvas a row stands; the base view comes first, with its own.

Two-layer MLP, RMSNorm, row and column positions, and a final RMSNorm whose weight sets how large
visual rows are beside text embeddings. Source: the released D-Attn successor (Vidi), whose visual
rows are built this way; T2V attention itself carries no positions, so they must be in the rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from torch import nn

from dattn_mcore.architectures.sizes import ModelConfig
from dattn_mcore.layers.norm import Norm
from dattn_mcore.layers.parts import LOCAL_PARTS
from dattn_mcore.layers.runtime import Runtime
from dattn_mcore.models.tile_share import Grid, places_of, stitched_order
from dattn_mcore.models.transformer_configs import projector_transformer_config
from dattn_mcore.types import VisualShape


class AxisPosition(nn.Module):
    """Position embedding of one image axis: sinusoid, float32 Linear-GELU-Linear, RMS-normalised.

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
        device = self.fc1.weight.device
        half = self.hidden_size // 2
        index = torch.arange(length, device=device, dtype=torch.float32)
        index = index * ((self.entries - 1) / max(length - 1, 1))
        exponent = torch.arange(half, device=device, dtype=torch.float32) / half
        angles = torch.outer(index, torch.exp(-math.log(10000.0) * exponent))
        y = self.fc2(F.gelu(self.fc1(torch.cat([angles.sin(), angles.cos()], dim=1))))
        return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)


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
            items: shape of each image; empty: every tile is an image of its own.
            tiles: which of the images' tiles `features` has; None: all of them.

        Returns:
            [tiles * patches, hidden]; of each image the rows of its base view, then those of its
            stitched canvas, both row by row. Where `tiles` is given tile after tile instead
            (`tile_share.stitched_order` is what they must be put into).
        """
        x, bias = self.mlp(features)
        x = self.norm(x + bias)
        stitched = any(item.grid[0] for item in items)
        if stitched:
            every = places_of(0, items)
            x = x + self._positions_of(
                every if tiles is None else every[tiles.start : tiles.stop], x.dtype
            )
        else:
            x = x + self._positions(self.grid, self.grid, x.dtype)
        x = x.flatten(0, 1)
        if stitched and tiles is None:
            order = stitched_order(len(features), items, self.grid)
            x = x[torch.from_numpy(order).to(x.device)]
        return self.output_norm(x)

    def _positions_of(
        self, places: Sequence[tuple[Grid, int]], dtype: torch.dtype
    ) -> torch.Tensor | float:
        """What is added to the rows of tiles, [tiles, patches, hidden]; 0 without positions."""
        if self.row_position is None:
            return 0.0
        side = self.grid
        of_grid: dict[Grid, torch.Tensor] = {}
        for grid in dict.fromkeys(grid for grid, _ in places):
            columns, rows = max(grid[0], 1), max(grid[1], 1)
            whole = self._positions(side * rows, side * columns, dtype)
            assert isinstance(whole, torch.Tensor)
            whole = whole.view(rows, side, columns, side, -1).transpose(1, 2)
            of_grid[grid] = whole.flatten(2, 3).flatten(0, 1)  # [tiles of the canvas, patches, ...]
        return torch.stack([of_grid[grid][number] for grid, number in places])

    def _positions(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor | float:
        """[rows * columns, hidden], what is added to the rows of a grid; 0 without positions."""
        if self.row_position is None or self.column_position is None:
            return 0.0
        place = self.row_position(rows)[:, None] + self.column_position(columns)[None, :]
        return place.flatten(0, 1).to(dtype)
