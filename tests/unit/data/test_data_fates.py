"""Whole, cut or left out: one answer for training, its steps, `check`, `stats` and `preview`."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dattn_mcore.config.schema import Config
from dattn_mcore.data.budgets import Fates
from dattn_mcore.data.check import check
from dattn_mcore.data.index.identity import difference, fingerprint_of, same_samples
from dattn_mcore.data.index.store import open_index
from dattn_mcore.data.pages.preview import write_preview
from dattn_mcore.data.pages.stats import packing_of
from dattn_mcore.data.pipeline import DataPipeline
from dattn_mcore.data.record_runs import texts_of
from dattn_mcore.data.samples import SampleReader
from dattn_mcore.data.steps import FullSteps
from dattn_mcore.data.templates import encode_sample, truncate
from dattn_mcore.data.tokenizer import SentencePieceTokenizer
from dattn_mcore.types import IGNORED_LABEL

MakeConfig = Callable[..., Config]
Record = Callable[..., dict[str, Any]]
ROWS = 16  # of a tile
TEXT, VISUAL = 60, 64
WORDS = "7 " * 80


def said(*turns: str) -> list[dict[str, str]]:
    speakers = ("human", "gpt")
    return [{"from": speakers[i % 2], "value": v} for i, v in enumerate(turns)]


@pytest.fixture
def records(record: Record) -> list[dict[str, Any]]:
    one, five = ["00.png"], ["00.png"] * 5
    return [
        record("whole", one, "<image>which?", "7"),
        record("cut", one, "<image>which?", WORDS),
        record("images-behind", five, "<image>which?", WORDS, "<image>" * 4, "7"),
        record("images-before", five, "<image>" * 5 + "which?", WORDS),
        record("all-images-behind", one, "which?", WORDS, "<image>", "7"),
        record("images", five, "<image>" * 5, "7"),
        record("question", one, "<image>" + WORDS, "7"),
        record("text", [], "which?", WORDS),
        record("short-text", [], "which?", "7 7"),
        {"id": "branches", "image": "00.png", "branches": [said("<image>a", WORDS)] * 2},
    ]


@pytest.fixture
def config(
    make_config: MakeConfig, records: list[dict[str, Any]], tmp_path: Path
) -> Callable[..., Config]:
    def make(times: int = 1, **data: Any) -> Config:
        path = tmp_path / f"{times}.json"
        path.write_text(
            json.dumps(
                [
                    {**one, "id": one["id"] + (f".{turn}" if times > 1 else "")}
                    for turn in range(times)
                    for one in records
                ]
            )
        )
        settings = {
            "annotations": str(path),
            "text_budget": TEXT,
            "visual_budget": VISUAL,
            "max_skipped_share": 1.0,
            "over_budget": "truncate",
        }
        return make_config(**(settings | data))

    return make


def by_definition(
    config: Config, tokenizer: SentencePieceTokenizer
) -> dict[str, tuple[str, tuple[int, int]]]:
    """Fate and rows of each sample, from its encoded text."""
    index, data = open_index(config, tokenizer), config.data
    reader = SampleReader(index, tokenizer, ROWS, 10**8)
    found = {}
    for number in range(len(index)):
        sample = index.sample(number)
        tiles = [image.num_tiles * ROWS for image in sample.images]
        texts = texts_of(tokenizer, data.template, reader.record(sample), data.loss_on)
        whole = [encode_sample(runs, tiles) for runs in texts]
        rows = (sum(len(one.text_ids) for one in whole), sum(tiles))
        fate = ("whole", rows)
        if rows[0] > data.text_budget or rows[1] > data.visual_budget:
            fate = ("left out", (0, 0))
            cut = truncate(whole[0], data.text_budget)
            learns = any(label != IGNORED_LABEL for label in cut.labels)
            fits = len(whole) == 1 and cut.visual_rows <= data.visual_budget
            if data.over_budget == "truncate" and learns and fits:
                fate = ("cut", (len(cut.text_ids), cut.visual_rows))
        found[sample.id] = fate
    reader.close()
    return found


@pytest.mark.parametrize("policy", ["truncate", "skip"])
@pytest.mark.parametrize("text", [8, TEXT, 90, 200])
def test_fates_are_those_of_the_encoded_text(
    config: MakeConfig, toy_tokenizer: SentencePieceTokenizer, text: int, policy: str
) -> None:
    settings = config(text_budget=text, over_budget=policy)
    expected = by_definition(settings, toy_tokenizer)
    index = open_index(settings, toy_tokenizer)
    fates = Fates(index, settings)
    for number, (name, (fate, rows)) in enumerate(expected.items()):
        found = "cut" if fates.cut[number] else "left out" if fates.left_out[number] else "whole"
        assert (found, tuple(fates.rows[number])) == (fate, rows), name
        fitted = fates.fit(number)
        taken = (fitted.text_rows, fitted.num_tiles * ROWS) if fitted is not None else (0, 0)
        assert taken == rows, name
    if (text, policy) == (TEXT, "truncate"):
        assert {name: fate for name, (fate, _) in expected.items()} == {
            **dict.fromkeys(["whole", "short-text"], "whole"),
            **dict.fromkeys(["cut", "images-behind", "all-images-behind", "text"], "cut"),
            **dict.fromkeys(["images-before", "images", "question", "branches"], "left out"),
        }
        assert expected["images-behind"][1] == (TEXT, ROWS)
        assert expected["all-images-behind"][1] == (TEXT, 0)


def test_training_cuts_and_leaves_out_what_check_and_stats_say(
    config: MakeConfig,
    toy_tokenizer: SentencePieceTokenizer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("dattn_mcore"), "propagate", True)
    settings = config()
    size = dataclasses.replace(settings.train, global_batch_size=10)
    settings = dataclasses.replace(settings, train=size)
    cut = {"cut", "images-behind", "all-images-behind", "text"}
    left_out = {"images-before", "images", "question", "branches"}
    pipeline = DataPipeline(
        settings, toy_tokenizer, dp_rank=0, dp_size=1, microbatch_multiple=1, needs_pixels=True
    )
    batch = pipeline.global_batch(0)
    pipeline.close()
    assert set(batch.truncated) == cut and {one.id for one in batch.skipped} == left_out
    with caplog.at_level(logging.INFO, "dattn_mcore"):
        assert check(settings, toy_tokenizer, 0, True, tmp_path / "found.jsonl") == 1
    found = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert {one["id"] for one in found} == left_out
    reasons = {one["id"]: one["reason"] for one in found}
    assert "line 1 (index 5, form llava): " in reasons["images"]
    assert reasons["images"].endswith(
        "; cut, it still has 80 visual rows (data.over_budget=truncate)"
    )
    assert "; cut, it has nothing left to predict (" in reasons["question"]
    assert "; a sample with branches is not cut (" in reasons["branches"]
    assert "10 samples, 20 images: 4 cannot be trained on" in caplog.text
    assert f"4 samples are cut to data.text_budget={TEXT}" in caplog.text
    packed = packing_of(open_index(settings, toy_tokenizer), settings, dp_size=1)
    assert (packed.over, packed.cut, packed.figures.samples) == (4, 4, (6,))
    assert packed.figures.shown == (3 * ROWS,)
    page = tmp_path / "preview.html"
    write_preview(settings, toy_tokenizer, page, 0, 5, ["cut", "question", "whole"])
    first, second, third = page.read_text().split('<section class="sample">')[1:]
    notes = [part.count('class="bad"') for part in (first, second, third)]
    assert f"{TEXT} text rows" in second and "cut: it has " in second
    assert "left out (data.over_budget=truncate): " in third and notes == [0, 1, 1]


def test_check_of_data_that_can_all_be_cut_finds_nothing(
    make_config: MakeConfig, toy_tokenizer: SentencePieceTokenizer, record: Record, tmp_path: Path
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([record(f"c{n}", [], "which?", WORDS) for n in range(3)]))
    for policy, status in (("truncate", 0), ("skip", 1), ("error", 1)):
        settings = make_config(annotations=str(path), text_budget=TEXT, over_budget=policy)
        assert check(settings, toy_tokenizer, 0, False, None) == status


@pytest.fixture
def full(config: MakeConfig, toy_tokenizer: SentencePieceTokenizer) -> DataPipeline:
    settings = config(times=12, step_packs_multiple=1, visual_budget=VISUAL)
    size = dataclasses.replace(settings.train, global_batch_size=20)
    pipeline = DataPipeline(
        dataclasses.replace(settings, train=size),
        toy_tokenizer,
        dp_rank=0,
        dp_size=1,
        microbatch_multiple=1,
        needs_pixels=False,
    )
    yield pipeline
    pipeline.close()


def test_full_steps_count_what_is_left_of_samples(
    full: DataPipeline, config: MakeConfig, toy_tokenizer: SentencePieceTokenizer
) -> None:
    """Each step takes samples until the next one's rows, cut as it is, do not fit any more."""
    rows = by_definition(config(times=12), toy_tokenizer)
    steps, names = full.steps, full.index.ids(range(len(full.index)))
    assert isinstance(steps, FullSteps)
    room = [int(budget * steps.packs * steps.fill) for budget in (TEXT, VISUAL)]
    bounds = [steps.bounds(step) for step in range(6)]  # before a thread asks, too
    for step, (start, end) in enumerate(bounds):
        taken = [rows[names[number]][1] for number in full.order.numbers(start, end + 1)]
        sums = np.cumsum(taken, axis=0)
        assert (sums[-2] <= room).all() and (sums[-1] > room).any()
        batch = full.global_batch(step)
        assert len(batch.microbatches) <= steps.packs
        assert batch.text_tokens == sums[-2][0]


def test_a_checkpoint_of_steps_that_were_counted_otherwise_is_refused(
    full: DataPipeline, config: MakeConfig, toy_tokenizer: SentencePieceTokenizer, record: Record
) -> None:
    former = {name: value for name, value in full.identity.items() if name != "cut_rows"}
    assert former != full.identity
    manifest = {"data": former, "data_fingerprint": fingerprint_of(former)}
    assert not same_samples(manifest, full.identity)
    words = difference(former, full.identity)
    assert words == (
        "which samples a step takes: with data.over_budget=truncate and data.step_packs_multiple "
        "a sample now counts the rows that are left of it"
    )
    own = {"data": full.identity, "data_fingerprint": fingerprint_of(full.identity)}
    assert same_samples(own, full.identity)


@pytest.mark.parametrize(
    ("names", "data", "other"),
    [
        (["whole", "cut", "text"], {}, False),  # as they were counted
        (["whole", "cut", "all-images-behind"], {}, True),
        (["whole", "cut", "question"], {}, True),
        (["whole", "question"], {"over_budget": "skip"}, False),
        (["whole", "cut", "question"], {"step_packs_multiple": None}, False),
    ],
)
def test_only_steps_that_changed_are_told_apart(
    config: MakeConfig,
    toy_tokenizer: SentencePieceTokenizer,
    records: list[dict[str, Any]],
    names: list[str],
    data: dict[str, Any],
    other: bool,
) -> None:
    records[:] = [one for one in records if one["id"] in names]
    settings = config(**({"step_packs_multiple": 1} | data))
    index = open_index(settings, toy_tokenizer)
    drawn = np.ones(len(index), bool)
    assert Fates(index, settings).counted_otherwise(drawn) is other
    assert not Fates(index, settings).counted_otherwise(~drawn)
