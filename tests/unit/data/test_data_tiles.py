"""Tile plans against transformers: the grid it chooses, and where it puts the image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import ChannelDimension
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from dattn_mcore.config.schema import DataConfig
from dattn_mcore.data import resize
from dattn_mcore.data.resize import to_tile
from dattn_mcore.data.tiles import POLICIES, choose_tiling, tiling_of_image
from dattn_mcore.errors import ConfigError, DataError
from dattn_mcore.hf.image_processing_dattn import DattnImageProcessor
from dattn_mcore.hf.image_rules_dattn import best_grid

GRIDS = DataConfig().anyres_grids
SIZE = st.integers(1, 3000)
TILE = st.sampled_from([28, 336, 384])


def resolutions(tile_size: int, grids=GRIDS) -> list[list[int]]:
    """Grids as transformers names them: (height, width) in pixels."""
    return [[rows * tile_size, columns * tile_size] for columns, rows in grids]


@settings(max_examples=300, deadline=None)
@given(SIZE, SIZE, TILE)
@example(1, 3000, 28)  # nothing survives any grid
@example(384, 384, 384)  # every grid shows the whole image: least waste decides, then the order
@example(768, 384, 384)
def test_the_grid_is_transformers_choice(width, height, tile_size):
    columns, rows = best_grid((width, height), (tile_size, tile_size), GRIDS, "first")
    expected = select_best_resolution((height, width), resolutions(tile_size))
    assert (rows * tile_size, columns * tile_size) == tuple(expected)


@settings(max_examples=200, deadline=None)
@given(SIZE, SIZE, TILE)
def test_the_letterbox_is_transformers_size_and_place(width, height, tile_size):
    tiling = choose_tiling(
        width, height, policy="anyres_letterbox", tile_size=tile_size, grids=GRIDS
    )
    target = (tiling.rows * tile_size, tiling.columns * tile_size)
    image = np.broadcast_to(np.uint8(0), (3, height, width))
    new_height, new_width = get_patch_output_size(image, target, ChannelDimension.FIRST)
    assert tiling.resized == (new_width, new_height)
    (top, _), (left, _) = LlavaNextImageProcessorPil()._get_padding_size(
        (new_height, new_width), target
    )
    assert tiling.offset == (left, top)


@pytest.mark.parametrize("size", [(40, 90), (90, 40), (60, 60), (300, 20), (21, 300), (500, 480)])
def test_tiles_of_a_white_image_are_llava_nexts(size):
    """Count and placement end to end: white where the image is, 0 around it."""
    tile_size = 28
    tiling = choose_tiling(*size, policy="anyres_letterbox", tile_size=tile_size, grids=GRIDS)
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": tile_size},
        crop_size={"height": tile_size, "width": tile_size},
        image_grid_pinpoints=resolutions(tile_size),
        do_rescale=False,
        do_normalize=False,
    )
    found = processor(Image.new("RGB", size, "white"), return_tensors="np").pixel_values[0]
    assert len(found) == tiling.num_tiles
    canvas = np.zeros((tiling.rows * tile_size, tiling.columns * tile_size))
    (x, y), (width, height) = tiling.offset, tiling.resized
    canvas[y : y + height, x : x + width] = 255
    tiles = [
        canvas[r : r + tile_size, c : c + tile_size]
        for r in range(0, canvas.shape[0], tile_size)
        for c in range(0, canvas.shape[1], tile_size)
    ]
    assert np.array_equal(found[1:, 0], np.stack(tiles))
    assert (found[0] == 255).all()


@pytest.mark.parametrize("size", [(40, 90), (91, 40), (28, 28), (29, 28)])
def test_crop_is_clips_window(size):
    """A column and row ramp shows which pixels CLIP's processor keeps."""
    tile_size = 28
    tiling = choose_tiling(*size, policy="crop", tile_size=tile_size, grids=GRIDS)
    assert min(tiling.resized) == tile_size and tiling.num_tiles == 1
    ramp = np.zeros((tiling.resized[1], tiling.resized[0], 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.indices(ramp.shape[:2])
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": tile_size},
        crop_size={"height": tile_size, "width": tile_size},
        do_rescale=False,
        do_normalize=False,
    )
    found = processor(Image.fromarray(ramp), return_tensors="np").pixel_values[0]
    assert (-int(found[1, 0, 0]), -int(found[0, 0, 0])) == tiling.offset


@pytest.mark.parametrize("size", [(40, 90), (91, 40), (28, 28), (29, 28), (300, 7)])
def test_pad_is_llavas_square(size):
    """A black image stands where LLaVA's processor puts it on the mean's colour."""
    side, mean = max(size), [0.5, 0.25, 0.75]
    processor = LlavaImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=mean,
        do_pad=True,
        do_rescale=False,
        do_normalize=False,
    )
    found = processor(Image.new("RGB", size), return_tensors="pt").pixel_values[0]
    image = torch.zeros(3, size[1], size[0], dtype=torch.uint8)
    fill = tuple(int(channel * 255) for channel in mean)
    assert torch.equal(to_tile(image, side, "pad", fill), found.to(torch.uint8))
    assert choose_tiling(*size, policy="pad", tile_size=side, grids=GRIDS).num_tiles == 1


@pytest.mark.parametrize("size", [(300, 7), (7, 300), (131, 97), (97, 131), (1, 2000)])
def test_pad_in_bands_is_the_squares_resize(size, monkeypatch):
    """Bit for bit, though the square is never whole in memory."""
    side, fill = max(size), (120, 7, 255)
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, *size[::-1]), np.uint8))
    square = torch.tensor(fill, dtype=torch.uint8)[:, None, None].repeat(1, side, side)
    left, top = (side - size[0]) // 2, (side - size[1]) // 2
    square[:, top : top + size[1], left : left + size[0]] = image
    monkeypatch.setattr(resize, "_BAND", 10 * side)
    made = []
    whole = resize._resize
    monkeypatch.setattr(resize, "_resize", lambda *args: made.append(args[0].shape) or whole(*args))
    assert torch.equal(to_tile(image, 56, "pad", fill), whole(square, 56, 56))
    assert max(high * wide for _, high, wide in made) <= max(10, 56) * side


@pytest.mark.parametrize(
    ("policy", "size", "between"),
    [
        ("crop", (65_000, 1), "24960000 x 384"),
        ("crop", (1, 65_000), "384 x 24960000"),
        ("pad", (65_000, 1), "65000 x 65000"),
        ("stretch", (1, 90_000_000), "384 x 90000000"),
        ("anyres_stretch", (1, 90_000_000), "384 x 90000000"),
        ("anyres_letterbox", (1, 90_000_000), "384 x 90000000"),
    ],
)
def test_a_thin_image_is_refused_by_what_it_would_become(policy, size, between):
    args = dict(policy=policy, tile_size=384, grids=GRIDS)
    with pytest.raises(DataError, match=f"^x is too thin: .* {between} .*={policy} .* 100000000$"):
        tiling_of_image("x", *size, **args, max_pixels=10**8)
    # What is not thin passes: a panorama, all the pixels allowed, and small ones under a low cap.
    for fine in ((30_000, 3000), (3000, 30_000), (10_000, 10_000)):
        assert tiling_of_image("x", *fine, **args, max_pixels=10**8) == choose_tiling(*fine, **args)
    assert tiling_of_image("x", 600, 20, **args, max_pixels=20_000) == choose_tiling(
        600, 20, **args
    )


def test_what_a_plan_says():
    """Figures worked out by hand."""
    args = dict(tile_size=384, grids=GRIDS)
    tiling = choose_tiling(1000, 500, policy="anyres_stretch", **args)
    assert (tiling.grid, tiling.num_tiles) == ((2, 1), 3)
    assert (tiling.resized, tiling.offset) == ((768, 384), (0, 0))
    tiling = choose_tiling(900, 700, policy="anyres_letterbox", **args)
    assert (tiling.grid, tiling.num_tiles) == ((2, 2), 5)
    assert (tiling.resized, tiling.offset) == ((768, 598), (0, 85))
    for policy in ("stretch", "pad", "crop"):
        tiling = choose_tiling(900, 700, policy=policy, **args)
        assert (tiling.grid, tiling.num_tiles, tiling.base_view) == ((0, 0), 1, False)


def test_bad_settings():
    with pytest.raises(ConfigError, match="data.image_policy: 'anyres' is unknown; use stretch"):
        choose_tiling(3, 4, policy="anyres", tile_size=8, grids=GRIDS)
    with pytest.raises(ConfigError, match="data.anyres_grids: .*=anyres_stretch needs at least"):
        choose_tiling(3, 4, policy="anyres_stretch", tile_size=8, grids=())


@given(SIZE, SIZE, st.sampled_from(POLICIES))
@settings(max_examples=200, deadline=None)
def test_no_plan_exceeds_the_largest(width, height, policy):
    """The bound that the visual budget is checked against."""
    tiling = choose_tiling(width, height, policy=policy, tile_size=56, grids=GRIDS)
    assert 1 <= tiling.num_tiles <= DataConfig(image_policy=policy).max_tiles


def squeezed(width: int, height: int, grid: tuple[int, int]) -> float:
    """By how much more one axis is resized than the other when the image fills the canvas."""
    across, down = grid[0] / width, grid[1] / height
    return max(across, down) / min(across, down)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((300, 100), (2, 1)),  # a sixfold squeeze on the first of the equals, (1, 2)
        ((100, 300), (1, 2)),
        ((110, 100), (2, 1)),
        ((100, 100), (1, 2)),  # equally near: the first
        ((2000, 100), (4, 1)),  # no tie: it shows more of the image than (2, 1)
    ],
)
def test_stretching_takes_the_nearest_of_equal_canvases(size, expected):
    args = {"tile_size": 384, "grids": GRIDS}
    assert choose_tiling(*size, policy="anyres_stretch", **args).grid == expected
    by_order = choose_tiling(*size, policy="anyres_stretch", ties="first", **args).grid
    assert choose_tiling(*size, policy="anyres_letterbox", **args).grid == by_order


@settings(max_examples=300, deadline=None)
@given(SIZE, SIZE, TILE)
@example(300, 100, 384)
def test_ties_alone_are_decided_by_the_aspect_ratio(width, height, tile_size):
    """What a canvas shows and wastes stays the best there is; only equals trade places."""
    args = {"tile_size": tile_size, "grids": GRIDS}
    near = choose_tiling(width, height, policy="anyres_stretch", **args)
    first = choose_tiling(width, height, policy="anyres_stretch", ties="first", **args)
    both = [(tiling.columns, tiling.rows) for tiling in (near, first)]
    shown = [
        min(int(width * scale) * int(height * scale), width * height)
        for columns, rows in both
        for scale in [min(columns * tile_size / width, rows * tile_size / height)]
    ]
    assert shown[0] == shown[1]
    assert both[0][0] * both[0][1] == both[1][0] * both[1][1]
    assert squeezed(width, height, both[0]) <= squeezed(width, height, both[1]) * (1 + 1e-12)
    letterbox = choose_tiling(width, height, policy="anyres_letterbox", **args)
    assert (letterbox.columns, letterbox.rows) == both[1]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 120), st.integers(1, 120), st.sampled_from(["aspect", "first"]))
def test_the_exported_processor_takes_the_same_canvas(width, height, ties):
    image = Image.new("RGB", (width, height))
    for policy in ("anyres_stretch", "anyres_letterbox"):
        processor = DattnImageProcessor(
            size={"height": 8, "width": 8},
            image_policy=policy,
            anyres_ties=ties,
            anyres_grids=[list(grid) for grid in GRIDS],
        )
        found = processor([image], return_tensors="np")["image_grids"].tolist()
        tiling = choose_tiling(width, height, policy=policy, tile_size=8, grids=GRIDS, ties=ties)
        assert found == [list(tiling.grid)]
