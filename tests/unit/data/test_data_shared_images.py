"""Samples of a micro-batch that show the same images: read once, and seen by each of them."""

from __future__ import annotations

import dataclasses
import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dattn_mcore.config.checks import check_config
from dattn_mcore.config.load import from_dict
from dattn_mcore.config.saved import saved_config
from dattn_mcore.config.schema import AttentionConfig, Config, LoraConfig
from dattn_mcore.config.sharing import why_apart
from dattn_mcore.data.balance import pack_rows, split_over_ranks
from dattn_mcore.data.batch import GlobalBatch, MicroBatch
from dattn_mcore.data.failures import mask
from dattn_mcore.data.index.identity import difference, fingerprint_of, identity_of
from dattn_mcore.data.index.store import open_index
from dattn_mcore.data.packing import make_packs
from dattn_mcore.data.pages.stats import packing_of
from dattn_mcore.data.pipeline import DataPipeline
from dattn_mcore.data.shared_images import images_of
from dattn_mcore.data.tokenizer import SentencePieceTokenizer
from dattn_mcore.errors import ConfigError
from dattn_mcore.types import IGNORED_LABEL, NO_IMAGES, visual_units

ROWS = 16  # visual rows of a tile: (56 // 14) ** 2
MakeConfig = Callable[..., Config]
# Images of each sample; a link leads to image 0.
SHOWN = [(0,), (0,), (), (0, 1), (1, 0), (0, 1), (1,), ("link",), (0, 1), (), (1, 1), (0,)]
UNITS = [0, 0, NO_IMAGES, 1, 2, 1, 3, 0, 1, NO_IMAGES, 4, 0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 samples over two images."""
    made = tmp_path_factory.mktemp("shared")
    (made / "images").mkdir()
    rng = np.random.default_rng(0)
    for number in range(2):
        pixels = rng.integers(0, 256, (56, 140, 3), dtype=np.uint8)
        pixels[0, 0] = number
        Image.fromarray(pixels).save(made / "images" / f"{number}.png")
    records: list[dict[str, Any]] = []
    for number, shown in enumerate(SHOWN):
        # Marks at the start of the first turn, and of the second: text stands before an image.
        turns = []
        for turn in range(max(1, len(shown))):
            mark = "<image>\n" if turn < len(shown) else ""
            turns.append({"from": "human", "value": f"{mark}which?"})
            turns.append({"from": "gpt", "value": "7 " * (1 + number % 3)})
        record: dict[str, Any] = {"id": f"r{number}", "conversations": turns}
        records.append(record | ({"image": [f"{image}.png" for image in shown]} if shown else {}))
    (made / "toy.json").write_text(json.dumps(records))
    return made


@pytest.fixture
def config(make_config: MakeConfig, folder: Path) -> MakeConfig:
    (folder / "images" / "link.png").unlink(missing_ok=True)
    (folder / "images" / "link.png").hardlink_to(folder / "images" / "0.png")
    return lambda **data: make_config(
        **{
            "global_batch_size": 12,
            "annotations": str(folder / "toy.json"),
            "image_folder": str(folder / "images"),
            "text_budget": 4000,
            "visual_budget": 16 * 15,
            **data,
        }
    )


def batch_of(
    config: Config, tokenizer: SentencePieceTokenizer, rank: int = 0, size: int = 1
) -> GlobalBatch:
    pipeline = DataPipeline(
        config, tokenizer, dp_rank=rank, dp_size=size, microbatch_multiple=1, needs_pixels=True
    )
    try:
        return pipeline.global_batch(0)
    finally:
        pipeline.close()


def by_sample(micro: MicroBatch, rows: int = ROWS) -> dict[str, Any]:
    """Layout, text, labels and pixels of each sample, taken apart by `images_of`."""
    units = visual_units(micro.layouts, micro.images_of)
    assert sum(units) == micro.num_tiles * rows
    ends = np.cumsum(units) // rows
    found, row = {}, 0
    numbers = micro.images_of or range(len(micro.layouts))
    for name, layout, unit in zip(micro.sample_ids, micro.layouts, numbers, strict=True):
        text = sum(count for is_visual, count in layout if not is_visual)
        pixels = None
        if unit != NO_IMAGES and units[unit]:
            assert micro.tiles is not None
            pixels = micro.tiles[ends[unit] - units[unit] // rows : ends[unit]].tolist()
        ids, labels = micro.text_ids[row : row + text], micro.labels[row : row + text]
        found[name] = layout, ids.tolist(), labels.tolist(), pixels
        row += text
    return found


def test_samples_are_what_they_are_apart(
    config: MakeConfig, toy_tokenizer: SentencePieceTokenizer
) -> None:
    (shared,) = batch_of(config(), toy_tokenizer).microbatches
    batch = batch_of(config(share_images=False), toy_tokenizer)
    (apart,) = batch.microbatches
    assert by_sample(shared) == by_sample(apart)
    assert apart.images_of == () and apart.num_tiles == sum(map(len, SHOWN)) == 15
    assert batch.visual_tokens == 15 * ROWS
    # Links to a file are files of their own; one image is decoded once for each unit that has it.
    order = [int(name[1:]) for name in shared.sample_ids]
    assert shared.images_of == images_of([expected_units()[i] for i in order])
    assert shared.num_tiles == len(shared.tiles) == len(shared.items) == 9
    assert batch_of(config(), toy_tokenizer).visual_tokens == 9 * ROWS


def expected_units() -> list[int]:
    return [9 if shown == ("link",) else unit for unit, shown in zip(UNITS, SHOWN, strict=True)]


def test_tiles_of_a_canvas_are_shared(
    config: MakeConfig, toy_tokenizer: SentencePieceTokenizer
) -> None:
    more = {"image_policy": "anyres_stretch", "visual_budget": 16 * 80}
    (shared,) = batch_of(config(**more), toy_tokenizer).microbatches
    (apart,) = batch_of(config(**more, share_images=False), toy_tokenizer).microbatches
    assert by_sample(shared) == by_sample(apart)
    assert len(shared.items) == 9 < len(apart.items)
    assert shared.num_tiles == sum(item.num_tiles for item in shared.items) > 18


@pytest.mark.parametrize("dp_size", [2, 3])
def test_ranks_have_one_plan(
    config: MakeConfig, toy_tokenizer: SentencePieceTokenizer, dp_size: int
) -> None:
    settings = config(visual_budget=16 * 4)
    whole = {}
    for micro in batch_of(settings, toy_tokenizer).microbatches:
        whole |= by_sample(micro)
    parts = [batch_of(settings, toy_tokenizer, rank, dp_size) for rank in range(dp_size)]
    union = {}
    for batch in parts:
        for micro in batch.microbatches:
            union |= by_sample(micro)
    assert union == whole
    computed = sum(micro.num_tiles for batch in parts for micro in batch.microbatches)
    assert {batch.visual_tokens for batch in parts} == {computed * ROWS}


def test_text_that_is_cut_shows_fewer_images(
    config: MakeConfig, toy_tokenizer: SentencePieceTokenizer
) -> None:
    """A sample whose second image is cut away shows the first alone, as others do."""
    whole = by_sample(batch_of(config(), toy_tokenizer).microbatches[0])
    (_, first), *_ = [run for run in whole["r3"][0] if not run[0]][1:]
    before = sum(rows for is_visual, rows in whole["r3"][0][:2] if not is_visual)
    budget = before + first - 1  # ends in the text between the images
    cut = config(text_budget=budget, over_budget="truncate", max_skipped_share=1.0)
    found: dict[str, Any] = {}
    for micro in batch_of(cut, toy_tokenizer).microbatches:
        found |= by_sample(micro)
    apart = {}
    for micro in batch_of(
        dataclasses.replace(cut, data=dataclasses.replace(cut.data, share_images=False)),
        toy_tokenizer,
    ).microbatches:
        apart |= by_sample(micro)
    assert found == apart
    assert sum(rows for is_visual, rows in found["r3"][0] if is_visual) == ROWS


def test_an_image_that_fails_takes_every_sample_that_shows_it(
    config: MakeConfig, toy_tokenizer: SentencePieceTokenizer, folder: Path
) -> None:
    settings = config()
    batch_of(settings, toy_tokenizer)  # makes the index
    image = folder / "images" / "1.png"
    good = image.read_bytes()
    image.write_bytes(good[: len(good) // 2])
    try:
        batch = batch_of(settings, toy_tokenizer)
    finally:
        image.write_bytes(good)
    failed = {number for number, shown in enumerate(SHOWN) if 1 in shown}
    assert {failure.sample for failure in batch.failures} == failed
    for failure in batch.failures:
        assert f"annotation 'r{failure.sample}'" in failure.reason and failure.path == "1.png"
        assert failure.id == f"r{failure.sample}"
    masked = by_sample(mask(batch.microbatches[0], failed))
    for number in range(len(SHOWN)):
        learns = any(label != IGNORED_LABEL for label in masked[f"r{number}"][2])
        assert learns == (number not in failed)


def test_why_samples_stay_apart() -> None:
    config = Config()
    assert why_apart(config) is None
    for changed, words in (
        ({"data": dataclasses.replace(config.data, share_images=False)}, "data.share_images=false"),
        ({"attention": AttentionConfig(v2v="causal")}, "attention.v2v=causal"),
        ({"attention": AttentionConfig(t2v_position="rope")}, "attention.t2v_position=rope"),
        ({"lora": LoraConfig(targets=("*.q_proj",), dropout=0.1)}, "lora.dropout=0.1"),
    ):
        assert words in (why_apart(dataclasses.replace(config, **changed)) or "")
    assert why_apart(dataclasses.replace(config, lora=LoraConfig(targets=("*.q_proj",)))) is None


def test_what_has_a_place_in_its_sample_is_said_to_stay_apart(
    config: MakeConfig, toy_tokenizer: SentencePieceTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    rope = dataclasses.replace(config(), attention=AttentionConfig(t2v_position="rope"))
    with caplog.at_level(logging.INFO, logger="dattn_mcore"):
        (micro,) = batch_of(rope, toy_tokenizer).microbatches
    assert micro.images_of == () and micro.num_tiles == 15
    said = [line for line in caplog.messages if "visual rows" in line]
    assert len(said) == 1 and "attention.t2v_position=rope" in said[0]


def test_units_of_a_pack() -> None:
    assert images_of([7, NO_IMAGES, 3, 7]) == (0, NO_IMAGES, 1, 0)
    assert images_of([7, NO_IMAGES, 3, NO_IMAGES]) == ()  # no two samples show the same
    assert images_of([]) == ()


@pytest.mark.parametrize("dp_size", [1, 2, 4, 8])
def test_ranks_that_share_images_have_equal_work(dp_size: int) -> None:
    """Work counts rows that are computed: dividing by all rows would leave ranks unlike."""
    rng = random.Random(4)
    units = [rng.randrange(60) for _ in range(192)]
    tiles = [rng.choice([1, 3, 4, 5]) for _ in range(60)]
    lengths = [(int(rng.lognormvariate(4.0, 0.8)) % 900 + 8, 729 * tiles[u]) for u in units]
    budgets, work = (4096, 14580), (1.0, 1.4)
    packs = make_packs(lengths, *budgets, dp_size)
    shares = split_over_ranks(packs, lengths, dp_size, budgets, work, units)
    assert sorted(i for share in shares for pack in share for i in pack) == list(range(192))
    rows = [[pack_rows(pack, lengths, units) for pack in share] for share in shares]
    assert all(text <= budgets[0] and visual <= budgets[1] for of in rows for text, visual in of)
    loads = [sum(text + 1.4 * visual for text, visual in of) for of in rows]
    assert max(loads) <= 1.05 * sum(loads) / dp_size
    assert sum(visual for of in rows for _, visual in of) < sum(visual for _, visual in lengths)


def test_samples_that_share_nothing_are_divided_as_ever() -> None:
    rng = random.Random(2)
    lengths = [
        (int(rng.lognormvariate(4.5, 1.0)) % 1500 + 8, 729 * rng.choice([0, 1, 3, 4, 5]))
        for _ in range(128)
    ]
    units = [number if rows else NO_IMAGES for number, (_, rows) in enumerate(lengths)]
    budgets, work = (9000, 60000), (1.0, 1.37)
    packs = tuple(tuple(range(first, first + 16)) for first in range(0, 128, 16))
    shares = split_over_ranks(packs, lengths, 8, budgets, work)
    assert split_over_ranks(packs, lengths, 8, budgets, work, units) == shares
    assert sorted(pack for share in shares for pack in share) != sorted(packs)  # some moved


def test_stats_say_what_sharing_saves(
    config: MakeConfig, toy_tokenizer: SentencePieceTokenizer
) -> None:
    for shares, saved in ((True, 6 / 15), (False, 0.0)):
        settings = config(share_images=shares)
        index = open_index(settings, toy_tokenizer)
        packed = packing_of(index, settings, dp_size=1)
        assert (packed.over, packed.figures.packs[0]) == (0, 1)
        assert packed.figures.saved == pytest.approx(saved)
        # Six units hold 9 of 15 tiles, and the images of these are three.
        assert (packed.same, packed.overlapping) == (6 * ROWS, 6 * ROWS)


def test_rows_of_a_pack() -> None:
    lengths = [(5, 16), (7, 16), (2, 0), (3, 32), (4, 16)]
    assert pack_rows((0, 1, 2, 4), lengths, [0, 0, NO_IMAGES, 1, 2]) == (18, 32)
    assert pack_rows((0, 1, 2, 4), lengths) == (18, 48)


def test_a_run_goes_on_with_and_without(
    config: MakeConfig, toy_tokenizer: SentencePieceTokenizer
) -> None:
    """Sharing is no part of what tells data sets apart, and a step takes the same samples."""
    index = open_index(config(), toy_tokenizer)
    shared, apart = (config(share_images=shares) for shares in (True, False))
    assert identity_of(index, shared.data) == identity_of(index, apart.data)
    samples = [batch_of(settings, toy_tokenizer).samples for settings in (shared, apart)]
    assert samples[0] == samples[1]


def test_a_former_run_did_not_share() -> None:
    assert from_dict({}).data.share_images is True
    assert saved_config({"data": {"text_budget": 64}}).data.share_images is False
    assert saved_config({"data": {"share_images": True}}).data.share_images is True


def test_grouped_samples_share_a_step_and_its_packs(
    config: MakeConfig, toy_tokenizer: SentencePieceTokenizer
) -> None:
    """Steps of four: image 0 alone is shown by three samples, the pair (0, 1) by three."""
    alike = {name: [f"r{i}" for i in range(12) if SHOWN[i] == name] for name in ((0,), (0, 1))}
    seen, rows = {}, {}
    for groups in (True, False):
        settings = config(group_images=groups, global_batch_size=4)
        for size in (1, 2):
            pipeline = DataPipeline(
                settings,
                toy_tokenizer,
                dp_rank=0,
                dp_size=size,
                microbatch_multiple=1,
                needs_pixels=False,
            )
            steps = [pipeline.global_batch(step) for step in range(3)]
            seen[groups, size] = [step.sample_ids for step in steps]
            if size == 1:
                rows[groups] = sum(step.visual_tokens for step in steps)
            pipeline.close()
        assert seen[groups, 1] == seen[groups, 2]
        assert sorted(name for step in seen[groups, 1] for name in step) == sorted(
            f"r{i}" for i in range(12)
        )
    for names in alike.values():
        assert sum(set(names) <= set(step) for step in seen[True, 1]) == 1
    assert seen[True, 1] != seen[False, 1]
    assert rows[True] == ROWS * (15 - 2 - 4) < rows[False] < ROWS * 15


def test_groups_are_part_of_what_a_checkpoint_was_trained_on(
    config: MakeConfig, toy_tokenizer: SentencePieceTokenizer
) -> None:
    plain, grouped = config(), config(group_images=True)
    index = open_index(plain, toy_tokenizer)
    there, here = identity_of(index, plain.data), identity_of(index, grouped.data)
    assert fingerprint_of(there) != fingerprint_of(here)
    assert difference(there, here) == "the order of samples (data.group_images)"
    assert difference(here, there) == "the order of samples (data.group_images)"


def test_groups_that_share_nothing_are_refused() -> None:
    tree = {"data": {"group_images": True, "share_images": False}}
    with pytest.raises(ConfigError, match=r"data.group_images=true .*share_images=false.*to false"):
        check_config(from_dict(tree))
    check_config(from_dict({"data": {"group_images": True}}))
