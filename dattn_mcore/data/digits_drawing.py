"""Real handwritten digits, and how they are drawn larger: the embedded data sets' ink."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
from torch.nn import functional

CELL_PIXELS = 28  # side of a digit as drawn
HELD_OUT_SHARE = 0.2  # of the digits, from the front: other hands than those of the rest


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns float32 [1797, 8, 8] in 0..1 (1: ink) and int labels [1797]."""
    datasets: Any = importlib.import_module("sklearn.datasets")  # slow to import
    images, labels = datasets.load_digits(return_X_y=True)
    return (images.reshape(-1, 8, 8) / 16.0).astype(np.float32), labels.astype(int)


def draw_cells(
    images: np.ndarray, chosen: np.ndarray, rng: np.random.Generator, vary: bool
) -> np.ndarray:
    """Enlarges digits from 8 x 8 to cells of 28 x 28 pixels, light ink on dark.

    Returns:
        uint8 [len(chosen), 28, 28].
    """
    count = len(chosen)
    amounts = rng.uniform(-1, 1, (count, 4)) if vary else np.zeros((count, 4))
    turn = amounts[:, 0] * np.deg2rad(10)
    zoom = 1.0 + 0.1 * amounts[:, 1]
    matrices = np.zeros((count, 2, 3), np.float32)
    matrices[:, 0, 0] = matrices[:, 1, 1] = np.cos(turn) * zoom
    matrices[:, 0, 1], matrices[:, 1, 0] = -np.sin(turn) * zoom, np.sin(turn) * zoom
    matrices[:, :, 2] = 0.12 * amounts[:, 2:]  # in half cells: up to 1.7 pixels
    cells = np.empty((count, CELL_PIXELS, CELL_PIXELS), np.uint8)
    shape = [1, CELL_PIXELS, CELL_PIXELS]
    for start in range(0, count, 4096):
        part = slice(start, start + 4096)
        source = torch.from_numpy(images[chosen[part]])[:, None]
        grid = functional.affine_grid(
            torch.from_numpy(matrices[part]), [len(source), *shape], align_corners=False
        )
        drawn = functional.grid_sample(source, grid, mode="bicubic", align_corners=False)
        cells[part] = (drawn[:, 0].clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    return cells
