"""From pixels to visual rows: the vision tower, the projector, row and column positions."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModel, PreTrainedModel, SiglipVisionModel
from transformers.models.mistral.modeling_mistral import MistralRMSNorm

from .configuration_dattn import DattnConfig


def build_vision_tower(config: DattnConfig) -> PreTrainedModel:
    """Returns transformers' own tower without the layers and norms whose output nobody reads."""
    vision = config.vision_config
    siglip = vision.model_type == "siglip_vision_model"
    if siglip:
        vision.vision_use_head = False
    tower: Any = (SiglipVisionModel if siglip else CLIPVisionModel)(vision)
    del tower.encoder.layers[config.num_vision_layers :]
    if not siglip or config.vision_feature_layer != -1:
        tower.post_layernorm = nn.Identity()  # CLIP applies it to the pooled row only
    return tower


def tower_features(tower: PreTrainedModel, pixel_values: Tensor) -> Tensor:
    """Patch features [images, rows, width]; CLIP's class row is dropped."""
    features = tower(pixel_values).last_hidden_state
    return features[:, 1:] if isinstance(tower, CLIPVisionModel) else features


class DattnAxisPosition(nn.Module):
    """Embedding of a row or column number: sinusoids, Linear-GELU-Linear, RMS-normalised."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.hidden_size, self.eps = hidden_size, eps
        self.fc1 = nn.Linear(hidden_size, hidden_size)
        self.fc2 = nn.Linear(hidden_size, hidden_size)

    def forward(self, length: int, size: int) -> Tensor:
        """Embeds an axis of `length` entries, rescaled to 0..size-1, in float32.

        Returns:
            [length, hidden_size].
        """
        device = self.fc1.weight.device
        wide = torch.promote_types(self.fc1.weight.dtype, torch.float32)
        half = self.hidden_size // 2
        index = torch.arange(length, device=device, dtype=wide)
        index = index * ((size - 1) / max(length - 1, 1))
        exponent = torch.arange(half, device=device, dtype=wide) / half
        angle = torch.outer(index, torch.exp(-math.log(10000.0) * exponent))
        wave = torch.cat([angle.sin(), angle.cos()], dim=-1)
        hidden = F.gelu(F.linear(wave, self.fc1.weight.to(wide), self.fc1.bias.to(wide)))
        y = F.linear(hidden, self.fc2.weight.to(wide), self.fc2.bias.to(wide))
        return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)


class DattnProjector(nn.Module):
    """Two-layer MLP, norm, row and column positions, norm: tower features to LLM rows."""

    def __init__(self, config: DattnConfig) -> None:
        super().__init__()
        hidden, eps = config.text_config.hidden_size, config.projector_norm_eps
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, config.projector_hidden_size)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(config.projector_hidden_size, hidden)
        self.norm = MistralRMSNorm(hidden, eps=eps)
        if config.visual_positions:
            self.row_position = DattnAxisPosition(hidden, eps)
            self.column_position = DattnAxisPosition(hidden, eps)
        self.output_norm = MistralRMSNorm(hidden, eps=eps)
        self.visual_positions, self.grid = config.visual_positions, config.grid
        self.scale = hidden**0.5 if config.text_config.model_type == "gemma2" else None

    def forward(self, features: Tensor) -> Tensor:
        """Projects [images, rows, width], rows in row-major order, to [images, rows, hidden]."""
        x = self.norm(self.linear_2(self.act(self.linear_1(features))))
        if self.visual_positions:
            rows, columns = self.grid
            x = x.unflatten(1, self.grid)
            place = self.row_position(rows, rows)[:, None] + self.column_position(columns, columns)
            x = (x + place.to(x.dtype)).flatten(1, 2)
        x = self.output_norm(x)
        return x if self.scale is None else x * torch.tensor(self.scale, dtype=x.dtype)


__all__ = [
    "DattnAxisPosition",
    "DattnProjector",
    "build_vision_tower",
    "tower_features",
]
