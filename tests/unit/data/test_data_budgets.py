"""Samples over budget: known before the first step, bounded, and never all of a run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dattn_mcore.config.schema import Config
from dattn_mcore.data.pipeline import DataPipeline
from dattn_mcore.data.tokenizer import SentencePieceTokenizer
from dattn_mcore.errors import DataError

Record = Callable[..., dict[str, Any]]
MakeConfig = Callable[..., Config]


def opened(config: Config, tokenizer: SentencePieceTokenizer) -> DataPipeline:
    """A pipeline of a single rank that opens no image."""
    return DataPipeline(
        config, tokenizer, dp_rank=0, dp_size=1, microbatch_multiple=1, needs_pixels=False
    )


def with_records(config: Config, folder: Path, records: list[dict[str, Any]]) -> Config:
    """The configuration over other records."""
    path = folder / "records.json"
    path.write_text(json.dumps(records))
    data = dataclasses.replace(config.data, annotations=str(path))
    return dataclasses.replace(config, data=data)


@pytest.mark.parametrize("policy", ["skip", "truncate"])
def test_a_run_of_samples_over_budget_does_not_start(
    make_config: MakeConfig, toy_tokenizer: SentencePieceTokenizer, policy: str
) -> None:
    config = make_config(text_budget=1, over_budget=policy, max_skipped_share=1.0)
    with pytest.raises(DataError) as caught:
        opened(config, toy_tokenizer)
    message = str(caught.value)
    assert message.startswith("nothing can be trained: of 40 samples 0 are unusable and 40 over ")
    assert "data.text_budget=1 or data.visual_budget=64" in message and "\n" not in message
    assert ("set data.over_budget=truncate" in message) == (policy == "skip")


def test_truncation_that_leaves_no_answer_trains_nothing(
    make_config: MakeConfig, toy_tokenizer: SentencePieceTokenizer, tmp_path: Path, record: Record
) -> None:
    """A question as long as the budget; and one with more images than fit before the cut."""
    records = [
        record("long", ["00.png"], "<image>" + "7 " * 300, "7"),
        record("images", ["00.png"] * 5, "<image>" * 5, "7 " * 300),
    ]
    config = with_records(make_config(over_budget="truncate"), tmp_path, records)
    with pytest.raises(DataError, match="nothing can be trained: of 2 samples .* and 2 over"):
        opened(config, toy_tokenizer)


def test_images_behind_the_cut_count_no_more(
    make_config: MakeConfig, toy_tokenizer: SentencePieceTokenizer, tmp_path: Path, record: Record
) -> None:
    turns = ["<image> which?", "7 " * 300, "<image>" * 4, "7"]
    config = with_records(
        make_config(over_budget="truncate", max_skipped_share=0.0),
        tmp_path,
        [record("behind", ["00.png"] * 5, *turns)],
    )
    pipeline = opened(config, toy_tokenizer)
    _, (fitted, *_), skipped = pipeline.samples_of(0)
    pipeline.close()
    assert not skipped and fitted.num_tiles == 1


def test_the_share_that_may_be_skipped_is_bounded(
    make_config: MakeConfig, toy_tokenizer: SentencePieceTokenizer, tmp_path: Path, record: Record
) -> None:
    """Two of ten are too long; the bound counts whole samples."""
    records = [record(f"r{n}", ["00.png"], "<image>\nwhich?", "7") for n in range(8)]
    records += [record(f"L{n}", ["00.png"], "<image>\nwhich?", "7 " * 300) for n in range(2)]
    config = with_records(make_config(max_skipped_share=0.2), tmp_path, records)
    opened(config, toy_tokenizer).close()
    strict = dataclasses.replace(config.data, max_skipped_share=0.19)
    with pytest.raises(DataError) as caught:
        opened(dataclasses.replace(config, data=strict), toy_tokenizer)
    assert str(caught.value).startswith(
        "2 of 10 usable samples are over budget and would be skipped, "
        "data.max_skipped_share=0.19 allows 1: 'L0' has "
    )
    # Cut, both are trained on; and with `error` the first one ends the run when it comes.
    for policy in ("truncate", "error"):
        data = dataclasses.replace(strict, over_budget=policy)
        opened(dataclasses.replace(config, data=data), toy_tokenizer).close()


def test_parts_that_learn_from_images_need_some(
    make_config: MakeConfig, toy_tokenizer: SentencePieceTokenizer, tmp_path: Path, record: Record
) -> None:
    """The language model is frozen and no image fits: every gradient would be zero."""
    records = [record(f"t{n}", [], "which?", "7") for n in range(4)]
    config = with_records(make_config(), tmp_path, records)
    opened(config, toy_tokenizer).close()
    train = dataclasses.replace(config.train, trains=("projector",))
    with pytest.raises(DataError, match=r"nothing can be trained: train.trains=\['projector'\]"):
        opened(dataclasses.replace(config, train=train), toy_tokenizer)
