"""Ranks that divide the tiles of a pack: each opens the images of its own tiles, and no other."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dattn_mcore.config.schema import Config
from dattn_mcore.data.batch import GlobalBatch
from dattn_mcore.data.failures import mask
from dattn_mcore.data.images import ImageLoader
from dattn_mcore.data.tokenizer import SentencePieceTokenizer
from dattn_mcore.types import IGNORED_LABEL, tiles_of_rank
from tests.unit.data.test_data_pipeline import opened

FEW = 3


@pytest.fixture
def shapes_of_all(tmp_path: Path) -> Path:
    """Images of many shapes; samples of none, one and two, some of which show the same ones."""
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(4)
    records = []
    for number in range(18):
        pixels = rng.integers(0, 256, (int(rng.integers(40, 300)), int(rng.integers(40, 300)), 3))
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "images" / f"{number}.png")
        shown = number - number % 4  # of three samples out of four the same
        images = [[f"{shown}.png"], [f"{shown}.png"], [f"{number}.png", f"{shown}.png"], []]
        images = images[number % 4]
        turns = [
            {"from": "human", "value": "<image>" * len(images) + " which?"},
            {"from": "gpt", "value": "7 " * (number + 1)},
        ]
        record = {"id": f"r{number}", "image": images, "conversations": turns}
        records.append({key: value for key, value in record.items() if value})
    (tmp_path / "a.json").write_text(json.dumps(records))
    return tmp_path


@pytest.fixture
def config_of(shapes_of_all: Path, make_config: Callable[..., Config]) -> Callable[..., Config]:
    """A configuration over them."""

    def make(policy: str) -> Config:
        return make_config(
            annotations=str(shapes_of_all / "a.json"),
            image_folder=str(shapes_of_all / "images"),
            image_policy=policy,
            text_budget=200,
            visual_budget=480,
            prefetch=0,  # so that images are counted of one step
        )

    return make


@pytest.fixture
def opened_images(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each call of a loader has opened."""
    counts: list[int] = []
    files = ImageLoader._files

    def counted(self: ImageLoader, requests):  # noqa: ANN001, ANN202
        counts.append(len(requests))
        return files(self, requests)

    monkeypatch.setattr(ImageLoader, "_files", counted)
    return counts


def of_ranks(
    config: Config, tokenizer: SentencePieceTokenizer, ranks: int, step: int = 0
) -> list[GlobalBatch]:
    """A step's batch on each of the ranks that divide its packs."""
    with ExitStack() as stack:
        pipelines = [
            stack.enter_context(opened(config, tokenizer, tile_rank=rank, tile_ranks=ranks))
            for rank in range(ranks)
        ]
        return [pipeline.global_batch(step) for pipeline in pipelines]


@pytest.mark.parametrize("policy", ["stretch", "anyres_stretch", "anyres_letterbox"])
@pytest.mark.parametrize("ranks", [2, 5])
def test_ranks_have_the_tiles_of_a_whole_pack_together(
    config_of: Callable[..., Config],
    toy_tokenizer: SentencePieceTokenizer,
    policy: str,
    ranks: int,
) -> None:
    config = config_of(policy)
    (whole,) = of_ranks(config, toy_tokenizer, 1)
    shares = of_ranks(config, toy_tokenizer, ranks)
    assert len(whole.microbatches) > 1
    straddles = False
    for number, pack in enumerate(whole.microbatches):
        of_pack = [share.microbatches[number] for share in shares]
        assert pack.tiles is not None
        torch.testing.assert_close(torch.cat([one.tiles for one in of_pack]), pack.tiles)
        for rank, one in enumerate(of_pack):
            assert one.num_tiles == pack.num_tiles and one.items == pack.items
            assert len(one.tiles) == len(tiles_of_rank(pack.num_tiles, rank, ranks))
            assert torch.equal(one.text_ids, pack.text_ids)
            assert torch.equal(one.labels, pack.labels)
        ends = np.cumsum([item.num_tiles for item in pack.items])
        cuts = {tiles_of_rank(pack.num_tiles, rank, ranks).stop for rank in range(ranks)}
        straddles |= bool(cuts - {*ends.tolist(), 0})
    assert straddles == policy.startswith("anyres")


def test_each_opens_images_of_its_own_tiles_alone(
    config_of: Callable[..., Config],
    toy_tokenizer: SentencePieceTokenizer,
    opened_images: list[int],
) -> None:
    config = config_of("stretch")
    (whole,) = of_ranks(config, toy_tokenizer, 1)
    (all_images,) = opened_images
    assert all_images == sum(pack.num_tiles for pack in whole.microbatches)  # a tile each
    opened_images.clear()
    of_ranks(config, toy_tokenizer, FEW)
    assert sum(opened_images) == all_images
    assert max(opened_images) <= all_images // FEW + len(whole.microbatches)


def test_ranks_without_a_tile_open_nothing(
    make_config: Callable[..., Config],
    toy_tokenizer: SentencePieceTokenizer,
    opened_images: list[int],
) -> None:
    config = make_config(visual_budget=32, prefetch=0)  # two tiles a pack at most
    shares = of_ranks(config, toy_tokenizer, 8)
    found = [[pack.tiles for pack in share.microbatches if pack.num_tiles] for share in shares]
    assert all(len(tiles) == 0 for tiles in found[0])
    assert all(
        tiles is not None and tiles.shape[1:] == (3, 56, 56) for own in found for tiles in own
    )
    assert sum(len(tiles) for own in found for tiles in own) == sum(opened_images) > 0


def test_a_failure_on_one_rank_masks_the_sample_on_all(
    config_of: Callable[..., Config], toy_tokenizer: SentencePieceTokenizer, shapes_of_all: Path
) -> None:
    """By the failures of all ranks, as the training loop exchanges them."""
    config = config_of("anyres_stretch")
    with ExitStack() as stack:
        pipelines = [
            stack.enter_context(opened(config, toy_tokenizer, tile_rank=rank, tile_ranks=2))
            for rank in range(2)
        ]
        (shapes_of_all / "images" / "16.png").unlink()
        batches = [
            next(b for n in range(4) if {"r16"} & {*(b := p.global_batch(n)).sample_ids})
            for p in pipelines
        ]
    failures = {one.id for batch in batches for one in batch.failures}
    assert failures == {one for one in batches[0].sample_ids if one in ("r16", "r17")}
    numbers = {one.sample for batch in batches for one in batch.failures}
    for pair in zip(*(batch.microbatches for batch in batches), strict=True):
        labels = [mask(pack, numbers).labels for pack in pair]
        assert torch.equal(labels[0], labels[1])
        row = 0
        for name, layout in zip(pair[0].sample_ids, pair[0].layouts, strict=True):
            rows = sum(n for is_visual, n in layout if not is_visual)
            of_sample = labels[0][row : row + rows]
            assert bool((of_sample == IGNORED_LABEL).all()) == (name in failures)
            row += rows
