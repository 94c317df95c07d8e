"""From patch features to the visual rows of the language model.

Two-layer MLP, RMSNorm, row and column positions, and a final RMSNorm whose weight sets how large
visual rows are beside text embeddings. Source: the released D-Attn successor (Vidi), whose visual
rows are built this way; T2V attention itself carries no positions, so they must be in the rows.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from torch import nn

from dattn_mcore.config.schema import Config
from dattn_mcore.layers.norm import Norm
from dattn_mcore.layers.spec import mlp_spec
from dattn_mcore.models.transformer_configs import projector_transformer_config


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
    """

    def __init__(self, config: Config, pg_collection: ProcessGroupCollection) -> None:
        transformer_config = projector_transformer_config(config)
        super().__init__(config=transformer_config)
        self.tp_group = pg_collection.tp
        projector, hidden = config.model.projector, config.model.llm.hidden_size
        self.grid = config.model.vision.grid_size
        self.output_norm_init = projector.output_norm_init
        self.mlp = MLP(
            transformer_config,
            mlp_spec().submodules,
            input_size=config.model.vision.hidden_size,
            ffn_hidden_size=projector.ffn_hidden_size,
            tp_group=pg_collection.tp,
        )
        self.norm = Norm(transformer_config, hidden, projector.norm_eps)
        self.row_position = self.column_position = None
        if config.model.visual_positions:
            self.row_position = AxisPosition(hidden, self.grid, projector.norm_eps)
            self.column_position = AxisPosition(hidden, self.grid, projector.norm_eps)
        self.output_norm = Norm(transformer_config, hidden, projector.norm_eps)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Projects features of whole tiles, patches row by row; see the class."""
        x, bias = self.mlp(features)
        x = self.norm(x + bias)
        if self.row_position is not None and self.column_position is not None:
            rows = self.row_position(self.grid)[:, None]
            columns = self.column_position(self.grid)[None, :]
            x = x + (rows + columns).flatten(0, 1).to(x.dtype)
        return self.output_norm(x).flatten(0, 1)
