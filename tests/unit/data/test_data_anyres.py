"""AnyRes in the pipeline: each image has the tiles that the index planned."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dattn_mcore.config.schema import Config, DataConfig
from dattn_mcore.data.image_files import probe_image_file
from dattn_mcore.data.pipeline import DataPipeline
from dattn_mcore.data.tiles import choose_tiling
from dattn_mcore.data.tokenizer import SentencePieceTokenizer
from dattn_mcore.errors import DataError
from dattn_mcore.types import image_shapes
from tests.unit.data.folder_loader import FolderLoader as ImageLoader
from tests.unit.data.golden import picture
from tests.unit.data.test_data_images import BAD_FILES

GRIDS = DataConfig().anyres_grids
MAX_PIXELS = 1_000_000
ROWS = 16  # of a tile: (56 // 14) ** 2


@pytest.fixture
def wide_data(tmp_path: Path) -> Path:
    """Images of many shapes: one, two or none a sample."""
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(3)
    records = []
    for number in range(12):
        size = (int(rng.integers(40, 300)), int(rng.integers(40, 300)))
        colour = (number + 1, 100, 200)  # a test recognises an image by its red
        Image.new("RGB", size, colour).save(tmp_path / "images" / f"{number}.png")
        images = [[f"{number}.png"], [f"{number}.png", f"{number - 1}.png"], []][number % 3]
        turns = [
            {"from": "human", "value": "<image>" * len(images) + " which?"},
            {"from": "gpt", "value": "7 " * (number + 1)},
        ]
        records.append({"id": f"r{number}", "image": images, "conversations": turns})
    records = [{k: v for k, v in r.items() if v} for r in records]
    (tmp_path / "a.json").write_text(json.dumps(records))
    return tmp_path


@pytest.fixture
def anyres(wide_data: Path, make_config: Callable[..., Config]) -> Callable[..., Config]:
    """A configuration over those images."""

    def make(**data: object) -> Config:
        settings: dict[str, object] = {
            "annotations": str(wide_data / "a.json"),
            "image_folder": str(wide_data / "images"),
            "image_policy": "anyres_stretch",
            "text_budget": 400,
            "visual_budget": 400,
        }
        return make_config(**{**settings, **data})

    return make


def _opened(
    config: Config, tokenizer: SentencePieceTokenizer, needs_pixels: bool = True
) -> DataPipeline:
    return DataPipeline(
        config, tokenizer, dp_rank=0, dp_size=1, microbatch_multiple=1, needs_pixels=needs_pixels
    )


@pytest.mark.parametrize("policy", ["anyres_stretch", "anyres_letterbox"])
def test_packs_hold_each_image_as_planned(
    anyres: Callable[..., Config],
    wide_data: Path,
    toy_tokenizer: SentencePieceTokenizer,
    policy: str,
) -> None:
    config = anyres(image_policy=policy)
    pipeline, blind = (_opened(config, toy_tokenizer, pixels) for pixels in (True, False))
    batch, unseen = pipeline.global_batch(0), blind.global_batch(0)
    pipeline.close()
    blind.close()
    assert len(batch.microbatches) > 1
    seen, several = set(), False
    for micro, other in zip(batch.microbatches, unseen.microbatches, strict=True):
        assert other.tiles is None
        assert (micro.layouts, micro.items, micro.num_tiles) == (
            other.layouts,
            other.items,
            other.num_tiles,
        )
        grids = iter(item.grid for item in micro.items)
        tile = 0
        for name, layout in zip(micro.sample_ids, micro.layouts, strict=True):
            number = int(name[1:])
            images = [[number], [number, number - 1], []][number % 3]
            rows = 0
            for image in images:
                with Image.open(wide_data / "images" / f"{image}.png") as opened:
                    tiling = choose_tiling(
                        *opened.size, policy=policy, tile_size=56, grids=config.data.anyres_grids
                    )
                assert next(grids) == tiling.grid == (tiling.columns, tiling.rows)
                assert micro.tiles is not None
                mine = micro.tiles[tile : tile + tiling.num_tiles]
                assert set(mine[:, 0].unique().tolist()) - {0} == {image + 1}
                tile += tiling.num_tiles
                rows += tiling.num_tiles * ROWS
                seen.add(tiling.grid)
            assert sum(n for is_visual, n in layout if is_visual) == rows
            several |= len(images) > 1
        assert (tile, next(grids, None)) == (micro.num_tiles, None)
        assert micro.num_tiles * ROWS <= config.data.visual_budget
    assert len(seen) > 2 and several


def test_a_truncated_sample_keeps_the_tiles_of_the_images_left(
    tmp_path: Path, anyres: Callable[..., Config], toy_tokenizer: SentencePieceTokenizer
) -> None:
    """The second image stands behind the cut; its tiles must not be loaded."""
    (tmp_path / "images").mkdir(exist_ok=True)
    Image.new("RGB", (300, 50), (1, 2, 3)).save(tmp_path / "images/wide.png")
    Image.new("RGB", (50, 300), (4, 5, 6)).save(tmp_path / "images/high.png")
    said = ["<image> which?", "7 " * 5, "<image> which?", "7 " * 30]
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]
    record = {"id": "cut", "image": ["wide.png", "high.png"], "conversations": turns}
    (tmp_path / "cut.json").write_text(json.dumps([record]))
    for budget, grids in ((400, ((4, 1), (1, 4))), (20, ((4, 1),))):
        config = anyres(
            annotations=str(tmp_path / "cut.json"),
            image_folder=str(tmp_path / "images"),
            over_budget="truncate",
            text_budget=budget,
        )
        config = dataclasses.replace(
            config, train=dataclasses.replace(config.train, global_batch_size=1)
        )
        pipeline = _opened(config, toy_tokenizer)
        batch = pipeline.global_batch(0)
        pipeline.close()
        (micro,) = batch.microbatches
        assert bool(batch.truncated) == (budget == 20)
        assert (micro.items, micro.num_tiles) == (image_shapes(grids), 5 * len(grids))
        assert micro.tiles is not None and micro.tiles.shape[0] == micro.num_tiles


def test_an_image_that_changed_since_it_was_planned(tmp_path: Path) -> None:
    picture(200, 100).save(tmp_path / "a.png")
    loader = ImageLoader(tmp_path, size=56, policy="anyres_stretch", grids=GRIDS, backend="pillow")
    assert loader.load([("a", "a.png")], [(2, 1)]).shape[0] == 3
    with pytest.raises(
        DataError, match="'a': image 'a.png' is 200 x 100 .* but .1, 2. were planned"
    ):
        loader.load([("a", "a.png")], [(1, 2)])
    loader.close()


def _size(folder: Path, name: str) -> tuple[int, int]:
    header = probe_image_file(folder.resolve(), name, MAX_PIXELS)
    return header.width, header.height


def test_sizes_come_from_headers(tmp_path: Path) -> None:
    """Every format; a file cut after its header still has a size, and is no longer read whole."""
    for name, options in (("a.jpg", {}), ("a.png", {}), ("a.webp", {}), ("a.gif", {})):
        picture(131, 97).save(tmp_path / name, **options)
        assert _size(tmp_path, name) == (131, 97)
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    assert _size(tmp_path, "cut.jpg") == (131, 97)


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_header_is_reported_as_when_loading(tmp_path: Path, name: str) -> None:
    """What a header shows is refused with the words of the full check; the rest has a size."""
    folder = tmp_path / "images"
    folder.mkdir()
    make, message = BAD_FILES[name]
    make(folder / "x.jpg")
    try:
        size = _size(folder, "x.jpg")
    except DataError as error:
        assert message in str(error)
        assert str(error).startswith("image 'x.jpg'")
        assert "\n" not in str(error)
    else:
        assert "truncated" in message or "decoded" in message, name
        assert min(size) > 0
