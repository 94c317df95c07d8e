"""Rows of videos: against a second computation in float64, row by row."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from dattn_mcore.config.load import from_dict
from dattn_mcore.models.build import build_model
from dattn_mcore.models.pooling import shrink
from dattn_mcore.models.tile_share import share_tiles
from dattn_mcore.parallel.groups import single_process
from dattn_mcore.training.runtime import decide_runtime
from dattn_mcore.types import VisualShape
from tests.distributed.small_models import SMALL_MODEL

GRID = 4
ITEMS = (
    VisualShape(times=(0.0, 0.5, 2.0), frame_side=2, duration=3.0),
    VisualShape(),
    VisualShape(times=(0.0, 7.0), frame_side=3, duration=8.0),
    VisualShape(grid=(2, 1)),
    VisualShape(times=(0.0,), frame_side=GRID, duration=1.0),
)
TILES = sum(item.num_tiles for item in ITEMS)


def axis(module: torch.nn.Module, index: float, eps: float) -> torch.Tensor:
    """The embedding of one position, in float64."""
    half = module.hidden_size // 2
    angles = [index * math.exp(-math.log(10000.0) * n / half) for n in range(half)]
    sinusoid = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)], dtype=torch.float64)
    inside = F.gelu(module.fc1.weight.double() @ sinusoid + module.fc1.bias.double())
    y = module.fc2.weight.double() @ inside + module.fc2.bias.double()
    return y / (y.pow(2).mean() + eps).sqrt()


def norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm of one row."""
    return x / (x.pow(2).mean() + eps).sqrt() * weight.double()


def expected_rows(projector, features: torch.Tensor, seconds: bool) -> torch.Tensor:
    """Every visual row by itself."""
    first, eps = projector.mlp.linear_fc1, 1e-6
    second, rows, tile = projector.mlp.linear_fc2, [], 0
    weights = (first.weight, first.bias, second.weight, second.bias)
    w1, b1, w2, b2 = (weight.double() for weight in weights)

    def row(feature, line, lines, column, columns, time):
        x = w2 @ F.gelu(w1 @ feature + b1) + b2
        x = norm(x, projector.norm.weight, eps)
        for module, place, length in (
            (projector.row_position, line, lines),
            (projector.column_position, column, columns),
        ):
            x = x + axis(module, place * (GRID - 1) / max(length - 1, 1), eps)
        if time is not None:
            x = x + axis(projector.time_position, time, eps)
        return norm(x, projector.output_norm.weight, eps)

    for item in ITEMS:
        for number in range(len(item.times)):
            image = features[tile].double().T.reshape(1, -1, GRID, GRID)
            cells = F.interpolate(image, size=item.frame_side, mode="bilinear")[0]
            time = number * 9999 / max(len(item.times) - 1, 1)
            time = item.times[number] if seconds else time
            for line in range(item.frame_side):
                for column in range(item.frame_side):
                    cell = cells[:, line, column]
                    rows.append(row(cell, line, item.frame_side, column, item.frame_side, time))
            tile += 1
        if item.times:
            continue
        base, columns, lines = features[tile].double(), GRID * item.grid[0], GRID * item.grid[1]
        rows += [row(base[n], n // GRID, GRID, n % GRID, GRID, None) for n in range(GRID * GRID)]
        for line in range(lines):
            for column in range(columns):
                inside = line // GRID * item.grid[0] + column // GRID
                patch = features[tile + 1 + inside].double()[line % GRID * GRID + column % GRID]
                rows.append(row(patch, line, lines, column, columns, None))
        tile += item.num_tiles
    return torch.stack(rows)


@pytest.mark.parametrize("time_axis", ["clip", "seconds"])
def test_each_row_is_that_of_a_second_computation(time_axis: str) -> None:
    config = from_dict(
        {
            "model": {
                **SMALL_MODEL,
                "vision": {**SMALL_MODEL["vision"], "image_size": GRID * 14},
                "video": {"enabled": True, "time_axis": time_axis},
            },
            "train": {"precision": "fp32"},
        }
    )
    with single_process() as groups, torch.no_grad():
        (model,) = build_model(
            config.model,
            config.attention,
            decide_runtime(config),
            groups,
            device=torch.device("cpu"),
            seed=3,
        )
        generator = torch.Generator().manual_seed(5)
        for weight in (model.projector.norm.weight, model.projector.output_norm.weight):
            weight.copy_(1 + 0.3 * torch.randn(weight.shape, generator=generator))
        features = torch.randn(TILES, GRID**2, 32, generator=generator)
        found = model.projector(features, ITEMS)
        expected = expected_rows(model.projector, features, time_axis == "seconds")
        # An angle of 9999 is rounded to 1 / 2048 in float32.
        bound = 3e-5 if time_axis == "seconds" else 2**-11
        torch.testing.assert_close(found.double(), expected, atol=bound, rtol=0)
        # Divided over ranks, each gets its rows of the same.
        ranks, padded = 3, -(-len(found) // 3) * 3
        shares = [
            share_tiles(
                num_tiles=TILES, items=ITEMS, side=GRID, num_visual=padded, rank=r, ranks=ranks
            )
            for r in range(ranks)
        ]
        sent = [
            model.projector(features[s.tiles.start : s.tiles.stop], ITEMS, s.tiles)[s.send].split(
                s.send_counts
            )
            for s in shares
        ]
        for rank, share in enumerate(shares):
            received = torch.cat([of_rank[rank] for of_rank in sent])
            whole = received.new_zeros(share.num_visual, received.shape[1])
            whole[share.place] = received
            own = found[rank * share.num_visual : (rank + 1) * share.num_visual]
            torch.testing.assert_close(whole[: len(own)], own, atol=1e-5, rtol=0)


def test_a_grid_shrinks_as_an_image_does() -> None:
    features = torch.randn(3, 49, 5, dtype=torch.float64)
    for side in (1, 2, 3, 5, 7):
        images = features.transpose(1, 2).unflatten(2, (7, 7))
        expected = F.interpolate(images, size=side, mode="bilinear", align_corners=False)
        found = shrink(features, side)
        torch.testing.assert_close(found, expected.flatten(2).transpose(1, 2), atol=1e-6, rtol=0)


def test_a_model_of_images_has_no_positions_in_time() -> None:
    for video, has in ((False, False), (True, True)):
        config = from_dict({"model": {**SMALL_MODEL, "video": {"enabled": video}}})
        assert config.model.time_positions == has
