"""Records with branches: one sample, whose texts share its images and do not see each other."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dattn_mcore.config.schema import AttentionConfig, Config, LoraConfig
from dattn_mcore.data.batch import GlobalBatch, MicroBatch
from dattn_mcore.data.check import check
from dattn_mcore.data.failures import mask
from dattn_mcore.data.fitted_sample import fitted_sample
from dattn_mcore.data.held_out import record_key
from dattn_mcore.data.index.store import open_index
from dattn_mcore.data.pages.preview import write_preview
from dattn_mcore.data.pages.stats import packing_of
from dattn_mcore.data.pipeline import DataPipeline
from dattn_mcore.data.samples import SampleReader
from dattn_mcore.data.tokenizer import SentencePieceTokenizer
from dattn_mcore.errors import DataError
from dattn_mcore.types import IGNORED_LABEL, NO_IMAGES, visual_units

ROWS = 16  # visual rows of a tile: (56 // 14) ** 2
MakeConfig = Callable[..., Config]


def said(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


RECORDS: list[dict[str, Any]] = [
    {
        "id": "a",
        "image": "0.png",
        "branches": [
            said("<image>\nwhich?", "7"),
            said("which?", "7 7", "<image>which?", "7 7 7"),
            said("<image>", "0 1"),
        ],
        "weight": 2,
    },
    {"id": "b", "image": "0.png", "conversations": said("<image>\nwhich?", "1")},
    {
        "id": "c",
        "images": ["1.png", "2.png"],
        "branches": [said("<image><image>", "7"), said("<image>which?<image>", "3", "4", "5")],
    },
    {"id": "d", "branches": [said("which?", "7"), said("cell", "8")]},
    {"id": "e", "image": "2.png", "conversations": said("<image>\nwhich?", "1 2")},
]
TEXTS = {"a": 3, "b": 1, "c": 2, "d": 2, "e": 1}


@pytest.fixture
def config(make_config: MakeConfig, tmp_path: Path) -> Callable[..., Config]:
    (tmp_path / "images").mkdir()
    for number in range(3):
        rng = np.random.default_rng(number)
        pixels = rng.integers(0, 256, (56, 56, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")

    def make(records: list[dict[str, Any]] = RECORDS, **data: Any) -> Config:
        name = f"{abs(hash(json.dumps(records)))}.json"
        (tmp_path / name).write_text(json.dumps(records))
        settings = {
            "annotations": str(tmp_path / name),
            "image_folder": str(tmp_path / "images"),
            "text_budget": 4000,
            "visual_budget": ROWS * 8,
            "global_batch_size": len(records),
        }
        return make_config(**{**settings, **data})

    return make


def steps_of(
    config: Config, tokenizer: SentencePieceTokenizer, rank: int = 0, size: int = 1, first: int = 0
) -> list[GlobalBatch]:
    pipeline = DataPipeline(
        config, tokenizer, dp_rank=rank, dp_size=size, microbatch_multiple=1, needs_pixels=True
    )
    try:
        return [pipeline.global_batch(step) for step in range(first, 3)]
    finally:
        pipeline.close()


def by_text(batch: GlobalBatch) -> dict[str, list[Any]]:
    """Of each id its texts: layout, ids, labels, weight and pixels, taken apart by `images_of`."""
    found: dict[str, list[Any]] = {}
    for micro in batch.microbatches:
        rows = [sum(n for is_visual, n in one if not is_visual) for one in micro.layouts]
        texts = zip(micro.text_ids.split(rows), micro.labels.split(rows), strict=True)
        weights = micro.weights or (1.0,) * len(rows)
        shown = pixels_of(micro)
        for i, (ids, labels) in enumerate(texts):
            text = (micro.layouts[i], ids.tolist(), labels.tolist(), weights[i], shown[i])
            found.setdefault(micro.sample_ids[i], []).append(text)
    return found


def pixels_of(micro: MicroBatch) -> list[Any]:
    """Tiles that each text of a pack sees."""
    numbers = micro.images_of or range(len(micro.layouts))
    units = visual_units(micro.layouts, micro.images_of)
    assert sum(units) == micro.num_tiles * ROWS
    tiles = [] if micro.tiles is None else micro.tiles.split([rows // ROWS for rows in units])
    return [tiles[unit].tolist() if unit != NO_IMAGES and units[unit] else None for unit in numbers]


def own_records() -> list[dict[str, Any]]:
    """Each branch as a record of its own."""
    own = []
    for record in RECORDS:
        rest = {k: v for k, v in record.items() if k not in ("branches", "conversations")}
        for turns in record.get("branches") or [record["conversations"]]:
            own.append({**rest, "conversations": turns})
    return own


def test_a_pack_holds_what_records_of_their_own_would_give(
    config: MakeConfig, toy_tokenizer: SentencePieceTokenizer
) -> None:
    batch = steps_of(config(), toy_tokenizer)[0]
    (micro,) = batch.microbatches
    found, own = by_text(batch), by_text(steps_of(config(own_records()), toy_tokenizer)[0])
    apart = by_text(steps_of(config(own_records(), share_images=False), toy_tokenizer)[0])
    assert {name: len(texts) for name, texts in found.items()} == TEXTS
    for name, texts in found.items():
        # Samples of one id come in the order of the step, which is shuffled.
        assert (
            sorted(map(str, texts)) == sorted(map(str, own[name])) == sorted(map(str, apart[name]))
        )
    assert found["a"][0][3] == 2
    # One number, id and place; its visual rows once, those of `b` among them.
    assert micro.num_samples == len(batch.samples) == len(set(batch.samples)) == 5
    assert sorted(batch.sample_ids) == list("abcde")
    assert len(micro.samples) == len(micro.layouts) == len(micro.weights) == 9
    assert micro.num_tiles == len(micro.items) == 4
    assert (batch.visual_tokens, batch.text_tokens) == (4 * ROWS, len(micro.text_ids))


def test_the_index_knows_every_branch(
    config: MakeConfig, toy_tokenizer: SentencePieceTokenizer
) -> None:
    index = open_index(config(), toy_tokenizer)
    assert index.content["num_branched"] == 3
    reader = SampleReader(index, toy_tokenizer, ROWS, 10**8)
    for number, record in enumerate(RECORDS):
        fitted = fitted_sample(index, number)
        texts = reader.encode(fitted)  # raises where the layouts differ
        assert tuple(one.layout for one in texts) == fitted.layouts(ROWS)
        assert len(texts) == TEXTS[record["id"]]
        row = index.samples[number]
        assert int(row["text_rows"]) == sum(len(one.text_ids) for one in texts)
        labels = [label for one in texts for label in one.labels if label != IGNORED_LABEL]
        assert int(row["supervised"]) == len(labels) > 0
    reader.close()


@pytest.mark.parametrize("step_packs_multiple", [None, 2])
def test_ranks_and_resumed_runs_have_one_plan(
    config: MakeConfig, toy_tokenizer: SentencePieceTokenizer, step_packs_multiple: int | None
) -> None:
    budgets = {"visual_budget": ROWS * 2, "text_budget": 200}
    records = [{**one, "id": f"{one['id']}{turn}"} for turn in range(6) for one in RECORDS]
    settings = config(
        records, global_batch_size=8, step_packs_multiple=step_packs_multiple, **budgets
    )
    whole = steps_of(settings, toy_tokenizer)
    ranks = [steps_of(settings, toy_tokenizer, rank, 2) for rank in range(2)]
    for step, batch in enumerate(whole):
        union = by_text(ranks[0][step]) | by_text(ranks[1][step])
        assert union == by_text(batch)
        for rank in ranks:
            assert rank[step].samples == batch.samples
            for micro in rank[step].microbatches:  # budgets hold, and a sample is never divided
                assert len(micro.text_ids) <= 200 and micro.num_tiles <= 2
                for name in set(micro.sample_ids):
                    assert micro.sample_ids.count(name) == TEXTS[name[0]]
    (later,) = steps_of(settings, toy_tokenizer, first=2)
    assert by_text(later) == by_text(whole[2]) and later.samples == whole[2].samples


def test_a_sample_that_is_over_budget_is_left_out_and_never_cut(
    config: MakeConfig, toy_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    index = open_index(config(), toy_tokenizer)
    (file,) = index.settings.sources[0].files
    rows = {name: int(index.samples[i]["text_rows"]) for i, name in enumerate("abcde")}
    assert rows["a"] > max(rows[name] for name in "bcde")
    for cut, words in (("skip", ""), ("truncate", "; a sample with branches is not cut")):
        over = {"text_budget": rows["a"] - 1, "over_budget": cut, "max_skipped_share": 1.0}
        batch = steps_of(config(**over), toy_tokenizer)[0]
        (skipped,) = batch.skipped
        assert (skipped.id, skipped.stage, batch.truncated) == ("a", "budget", ())
        assert skipped.reason == (
            f"'{file}' (index 0, form llava): {rows['a']} text and 16 visual rows; "
            f"data.text_budget is {rows['a'] - 1}, data.visual_budget is 128{words}"
        )
        assert set(by_text(batch)) == set("bcde")
    fits = config(text_budget=rows["a"], visual_budget=2 * ROWS)
    assert by_text(steps_of(fits, toy_tokenizer)[0]) == by_text(
        steps_of(config(), toy_tokenizer)[0]
    )


def test_what_fails_takes_all_branches(
    config: MakeConfig, toy_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    settings = config()
    open_index(settings, toy_tokenizer)
    image = tmp_path / "images" / "0.png"
    image.write_bytes(image.read_bytes()[:4000])
    batch = steps_of(settings, toy_tokenizer)[0]
    assert sorted(failure.id for failure in batch.failures) == ["a", "b"]
    (micro,) = batch.microbatches
    masked = mask(micro, {failure.sample for failure in batch.failures})
    texts = by_text(dataclasses.replace(batch, microbatches=[masked]))
    for name, of_sample in texts.items():
        for _, _, labels, _, _ in of_sample:
            assert (set(labels) == {IGNORED_LABEL}) == (name in "ab")
    assert torch.equal(masked.text_ids, micro.text_ids)


def test_a_record_that_has_gone_is_blank_in_the_same_shapes(
    config: MakeConfig, toy_tokenizer: SentencePieceTokenizer
) -> None:
    settings = config()
    whole = by_text(steps_of(settings, toy_tokenizer)[0])
    file = Path(settings.data.annotations)
    pipeline = DataPipeline(
        settings, toy_tokenizer, dp_rank=0, dp_size=1, microbatch_multiple=1, needs_pixels=True
    )
    # As long as before, and one branch says more, the other less.
    file.write_text(file.read_text().replace('"7 7 7"', '"7 7"  '))
    try:
        batch = pipeline.global_batch(0)
    finally:
        pipeline.close()
    (failure,) = batch.failures
    said = "annotation 'a': the record is no longer the one that was indexed"
    assert failure.reason == f"'{file}' line 1 (index 0, form llava): {said}"
    found = by_text(batch)["a"]
    assert [text[0] for text in found] == [text[0] for text in whole["a"]]
    assert all(set(text[2]) == {IGNORED_LABEL} for text in found)


def test_runs_that_share_no_rows_refuse_branches(
    config: MakeConfig, toy_tokenizer: SentencePieceTokenizer
) -> None:
    for changed, reason in (
        ({"data": {"share_images": False}}, "data.share_images=false"),
        (
            {"attention": AttentionConfig(v2v="causal")},
            "attention.v2v=causal: visual rows attend to others of their sample",
        ),
        (
            {"attention": AttentionConfig(t2v_position="rope")},
            "attention.t2v_position=rope: a row has a place in its sample",
        ),
        (
            {"lora": LoraConfig(targets=("*.q_proj",), dropout=0.1)},
            "lora.dropout=0.1: each sample draws its own",
        ),
    ):
        settings = config(**changed.pop("data", {}))
        settings = dataclasses.replace(settings, **changed)
        for _ in range(2):  # making the index, and opening it
            with pytest.raises(DataError) as raised:
                open_index(settings, toy_tokenizer)
            assert str(raised.value) == (
                "annotation 'a' (and 1 more) has branches, which share visual rows, and this run "
                f"shares none ({reason}); change that, or make each branch a record of its own"
            )
        open_index(dataclasses.replace(config(RECORDS[3:]), **changed), toy_tokenizer)  # text alone


def test_check_stats_and_preview_read_branches(
    config: MakeConfig, toy_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    settings = config()
    assert check(settings, toy_tokenizer, 0, True, None) == 0
    packed = packing_of(open_index(settings, toy_tokenizer), settings, dp_size=1)
    assert (packed.over, packed.figures.computed[0]) == (0, 4 * ROWS)
    page = tmp_path / "preview.html"
    write_preview(settings, toy_tokenizer, page, 0, 5, ["a", "b"])
    first, second = page.read_text().split('<section class="sample">')[1:]
    for number in range(3):
        assert f'<p class="note">branch {number}</p>' in first
    assert "text rows in 3 branches, 16 visual rows" in first and first.count("<img") == 2
    assert first.count("[image 1: 16 rows]") == 3 and "branch" not in second


def test_what_is_held_out_is_told_apart_by_the_texts_of_all_branches(
    config: MakeConfig, toy_tokenizer: SentencePieceTokenizer
) -> None:
    other = {**RECORDS[3], "branches": [said("which?", "7"), said("cell", "9")]}
    joined = {**RECORDS[3], "branches": [said("which?", "7", "cell", "8"), said("a", "b")]}
    index = open_index(config([RECORDS[3], RECORDS[3], other, joined]), toy_tokenizer)
    reader = SampleReader(index, toy_tokenizer, ROWS, 10**8)
    keys = [record_key(reader.record(index.sample(number))) for number in range(4)]
    reader.close()
    assert keys[0] == keys[1] and len(set(keys)) == 3


def test_a_branch_of_which_nothing_is_learned_is_named(
    config: MakeConfig, toy_tokenizer: SentencePieceTokenizer
) -> None:
    silent = [*said("which?", "7"), {"from": "human", "value": "a"}]
    last = [*silent, {"from": "gpt", "value": "b", "loss": False}]
    records = [{**RECORDS[3], "branches": [said("which?", "7"), last]}, RECORDS[1]]
    index = open_index(config(records, loss_on="last"), toy_tokenizer)
    (bad,) = index.bad()
    assert bad["reason"] == (
        "branch 1: data.loss_on is 'last', and the last answer has 'loss' false; nothing to learn"
    )
    assert index.content["num_branched"] == 0
