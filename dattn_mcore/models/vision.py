"""The vision tower on a Megatron-Core TransformerBlock."""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import nn

from dattn_mcore.architectures import tower_features
from dattn_mcore.architectures.sizes import ModelConfig
from dattn_mcore.layers.norm import Norm
from dattn_mcore.layers.runtime import Runtime
from dattn_mcore.layers.spec import block_submodules, vision_layer_spec
from dattn_mcore.models.transformer_configs import vision_transformer_config


class VisionTower(MegatronModule):
    """Pixels to patch features. Whole on the first pipeline stage, tensor parallel.

    Args:
        model: sizes of the tower, and its kind.
        runtime: how it is computed.
        pg_collection: process groups; `tp` is used.

    Parameters beside the block's: `patch_embedding`; `class_embedding`, `patch_norm` and
    `pre_layernorm` (where its kind has them); `position_embedding` (unless
    `model.visual_positions` is false).
    """

    def __init__(
        self, model: ModelConfig, runtime: Runtime, pg_collection: ProcessGroupCollection
    ) -> None:
        tp_size = pg_collection.tp.size()
        transformer_config = vision_transformer_config(model, runtime, tp_size=tp_size)
        super().__init__(config=transformer_config)
        vision = self.vision = model.vision
        self.tp_group = pg_collection.tp
        features = tower_features(model)
        dtype, hidden = transformer_config.params_dtype, vision.hidden_size
        self.patch_embedding = nn.Conv2d(
            3, hidden, vision.patch_size, vision.patch_size, bias=features.patch_bias, dtype=dtype
        )
        self.patch_norm = None
        if features.patch_norm:
            self.patch_norm = Norm(transformer_config, hidden, vision.norm_eps)
        patches = vision.rows_per_tile
        self.class_embedding = None
        if features.class_row:
            self.class_embedding = nn.Parameter(torch.zeros(hidden, dtype=dtype))
        self.position_embedding = None
        if model.visual_positions:
            self.position_embedding = nn.Embedding(
                patches + features.class_row, hidden, dtype=dtype
            )
        self.pre_layernorm = None
        if features.pre_norm:
            self.pre_layernorm = Norm(transformer_config, hidden, vision.norm_eps)
        self.decoder = TransformerBlock(
            config=transformer_config,
            spec=block_submodules(
                [vision_layer_spec(model, runtime)] * transformer_config.num_layers, runtime
            ),
            post_layer_norm=features.final_norm and vision.select_layer == -1,
            pg_collection=pg_collection,
        )

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encodes tiles.

        Args:
            pixels: [tiles, 3, image_size, image_size], normalised, in the parameters' dtype;
                the same on every tensor parallel rank.

        Returns:
            [tiles, patches, hidden], patches row by row, class token dropped.
        """
        x = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        if self.patch_norm is not None:
            x = self.patch_norm(x)
        if self.class_embedding is not None:
            x = torch.cat([self.class_embedding.expand(x.shape[0], 1, -1), x], dim=1)
        if self.position_embedding is not None:
            # Called, not read: DDP gathers a module's weights when the module is called.
            x = x + self.position_embedding(torch.arange(x.shape[1], device=x.device))
        if self.pre_layernorm is not None:
            x = self.pre_layernorm(x)
        x = self.decoder(x.transpose(0, 1).contiguous(), attention_mask=None).transpose(0, 1)
        return x[:, 1:] if self.class_embedding is not None else x


def normalize_pixels(
    tiles: torch.Tensor,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    dtype: torch.dtype,
) -> torch.Tensor:
    """uint8 tiles [n, 3, size, size] to (x / 255 - mean) / std, computed in float32."""
    shift = torch.tensor(mean, device=tiles.device).view(1, 3, 1, 1)
    scale = torch.tensor(std, device=tiles.device).view(1, 3, 1, 1)
    return ((tiles.float() / 255.0 - shift) / scale).to(dtype)
