"""Features of a frame on a coarser grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def shrink(features: torch.Tensor, side: int) -> torch.Tensor:
    """Resizes square grids of features bilinearly, pixels' centres aligned (not their corners).

    As products with each axis's weights: PyTorch's own kernel adds up gradients on a GPU in an
    order that differs from run to run.

    Args:
        features: [frames, patches, width], patches row by row.
        side: rows, and columns, of the result.

    Returns:
        [frames, side * side, width].
    """
    grid = round(features.shape[1] ** 0.5)
    if side == grid:
        return features
    eye = torch.eye(grid, dtype=torch.float64, device=features.device)[None]
    weights = F.interpolate(eye, size=side, mode="linear", align_corners=False)[0].T
    weights = weights.to(features.dtype)  # [side, grid]
    squares = features.unflatten(1, (grid, grid))
    return torch.einsum("ai,bj,fijw->fabw", weights, weights, squares).flatten(1, 2)
