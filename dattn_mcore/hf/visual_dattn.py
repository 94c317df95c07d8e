"""From pixels to visual rows: the vision tower, the projector, row and column positions."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from .configuration_dattn import DattnConfig, releases
from .layers_dattn import DattnRMSNorm, scaled


def build_vision_tower(config: DattnConfig) -> PreTrainedModel:
    """Returns transformers' own tower without the layers and norms whose output nobody reads.

    Raises:
        RuntimeError: this release of transformers builds the tower otherwise.
    """
    vision = copy.deepcopy(config.vision_config)
    vision.num_hidden_layers = config.num_vision_layers
    features: Any = config.vision_features
    if hasattr(vision, "vision_use_head"):  # a head that pools rows, which nobody reads
        vision.vision_use_head = False
    tower: Any = AutoModel.from_config(vision, dtype=torch.get_default_dtype())
    if not features["final_norm"] or config.vision_feature_layer != -1:
        last_norm = config.vision_last_norm
        if not isinstance(getattr(tower, last_norm, None), nn.Module):
            raise RuntimeError(
                f"{type(tower).__name__} has no {last_norm}, which this model leaves out; "
                f"{releases()}"
            )
        setattr(tower, last_norm, nn.Identity())
    return tower


def tower_features(tower: PreTrainedModel, pixel_values: Tensor, class_row: bool) -> Tensor:
    """Patch features [images, rows, width]; a class row in front of them is dropped."""
    features = tower(pixel_values, return_dict=True).last_hidden_state
    return features[:, 1:] if class_row else features


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
        self.norm = DattnRMSNorm(hidden, eps)
        if config.visual_positions:
            self.row_position = DattnAxisPosition(hidden, eps)
            self.column_position = DattnAxisPosition(hidden, eps)
        self.output_norm = DattnRMSNorm(hidden, eps, start=config.projector_output_norm_init)
        self.visual_positions, self.grid = config.visual_positions, config.grid
        features: Any = config.text_features
        self.scale = hidden**0.5 if features["scale_embeddings"] else None

    def forward(self, features: Tensor, image_grids: list[list[int]]) -> tuple[Tensor, ...]:
        """Projects tower features to the visual rows of each image.

        Args:
            features: [tiles, rows of a tile, width], rows in row-major order; of each image the
                base view first, then the tiles of its canvas row by row.
            image_grids: columns and rows of each image's canvas in tiles; [0, 0]: no canvas.

        Returns:
            For each image [rows, hidden]: its base view, then its stitched canvas, row-major.
        """
        x = self.norm(self.linear_2(self.act(self.linear_1(features))))
        height, width = self.grid
        sizes = [(1, 1)] + [(rows, columns) for columns, rows in image_grids if columns]
        places = {size: self._place(size, x.dtype) for size in set(sizes)}
        images, tile = [], 0
        for columns, rows in image_grids:
            views = [x[tile] + places[1, 1]]
            tile += 1
            if columns:
                canvas = x[tile : tile + rows * columns].view(rows, columns, height, width, -1)
                tile += rows * columns
                stitched = canvas.transpose(1, 2).flatten(0, 3)  # rows of the canvas, not of tiles
                views.append(stitched + places[rows, columns])
            y = self.output_norm(torch.cat(views))
            images.append(y if self.scale is None else scaled(y, self.scale))
        return tuple(images)

    def _place(self, tiles: tuple[int, int], dtype: torch.dtype) -> Tensor | float:
        """Position embedding of a view of (rows, columns) tiles, [rows of the view, hidden]."""
        if not self.visual_positions:
            return 0.0
        height, width = self.grid
        rows = self.row_position(tiles[0] * height, height)
        columns = self.column_position(tiles[1] * width, width)
        return (rows[:, None] + columns).flatten(0, 1).to(dtype)


def place_rows(
    lengths: Sequence[int], counts: Tensor, images_before: Tensor | int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Where each image's visual rows stand in its sample.

    Args:
        lengths: visual rows of each image, in order of samples.
        counts: int64 [batch], images of each sample; they sum to the number of images.
        images_before: int64 [batch], images that each sample's cache holds; or 0.
        device: of the result and of `counts`.

    Returns:
        Which rows are real, bool [batch, rows of the sample with most]: its true places, sample
        after sample, are the images' rows in order. And the image of its sample that each belongs
        to, int64 of the same shape.
    """
    batch = counts.shape[0]
    length = torch.tensor(lengths, dtype=torch.long, device=device)
    sample = torch.arange(batch, device=device).repeat_interleave(counts)  # of each image
    first = counts.cumsum(0) - counts - images_before
    number = torch.arange(len(lengths), device=device) - first[sample]
    rows = torch.zeros(batch, dtype=torch.long, device=device).index_add(0, sample, length)
    most = int(rows.max()) if len(lengths) else 0
    live = torch.arange(most, device=device) < rows[:, None]
    image_of_row = torch.zeros(batch, most, dtype=torch.long, device=device)
    if len(lengths):
        image_of_row[live] = number.repeat_interleave(length)
    return live, image_of_row


def place_images(images: Sequence[Tensor], live: Tensor, like: Tensor) -> Tensor:
    """Puts each image's visual rows into its sample, padded to the sample with most rows.

    Args:
        images: rows [rows, hidden] of each image, in order of samples.
        live: bool [batch, rows], see `place_rows`.
        like: tensor whose dtype, device and last size the visual rows take.

    Returns:
        Visual rows [batch, rows, hidden].
    """
    visual = like.new_zeros(*live.shape, like.shape[-1])
    if images:
        visual[live] = torch.cat(list(images)).to(like)
    return visual


__all__ = [
    "DattnAxisPosition",
    "DattnProjector",
    "build_vision_tower",
    "place_images",
    "place_rows",
    "tower_features",
]
