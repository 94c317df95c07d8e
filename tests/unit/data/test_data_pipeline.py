"""The pipeline: what the loop gets, that it depends on the step alone, and what goes wrong."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dattn_mcore.config.schema import Config, LlmConfig, SourceConfig
from dattn_mcore.data.batch import GlobalBatch, MicroBatch
from dattn_mcore.data.failures import mask
from dattn_mcore.data.pipeline import DataPipeline
from dattn_mcore.data.prefetch import Prefetcher
from dattn_mcore.data.tokenizer import SentencePieceTokenizer
from dattn_mcore.errors import ConfigError, DataError
from dattn_mcore.types import NO_IMAGES, visual_units

ROWS = 16  # visual rows of one image: (56 // 14) ** 2
MakeConfig = Callable[..., Config]


@contextmanager
def opened(
    config: Config, tokenizer: SentencePieceTokenizer, **where: Any
) -> Iterator[DataPipeline]:
    """A pipeline that is closed again; by default of a single rank that needs pixels."""
    settings = {"dp_rank": 0, "dp_size": 1, "microbatch_multiple": 1, "needs_pixels": True}
    pipeline = DataPipeline(config, tokenizer, **{**settings, **where})
    try:
        yield pipeline
    finally:
        pipeline.close()


def by_sample(batch: GlobalBatch) -> dict[str, tuple[Any, ...]]:
    """Takes packs apart again: what each sample looks like to the model.

    A sample that comes twice, where two epochs meet, shares its tiles.
    """
    samples = {}
    for micro in batch.microbatches:
        units = visual_units(micro.layouts, micro.images_of)
        starts = [0, *itertools.accumulate(units)]
        row = 0
        numbers = micro.images_of or range(len(micro.layouts))
        for name, layout, unit in zip(micro.sample_ids, micro.layouts, numbers, strict=True):
            text = sum(rows for is_visual, rows in layout if not is_visual)
            tiles = sum(rows for is_visual, rows in layout if is_visual) // ROWS
            tile = 0 if unit == NO_IMAGES else starts[unit] // ROWS
            pixels = None if micro.tiles is None else micro.tiles[tile : tile + tiles].tolist()
            samples[name] = (
                layout,
                micro.text_ids[row : row + text].tolist(),
                micro.labels[row : row + text].tolist(),
                pixels if tiles else None,
            )
            row += text
        assert (row, sum(units)) == (len(micro.text_ids), micro.num_tiles * ROWS)
    return samples


def check_form(micro: MicroBatch, config: Config) -> None:
    """The promises of MicroBatch."""
    assert micro.text_ids.dtype == micro.labels.dtype == torch.int64
    assert micro.text_ids.shape == micro.labels.shape
    assert len(micro.layouts) == len(micro.sample_ids) == micro.num_samples
    text = sum(rows for layout in micro.layouts for is_visual, rows in layout if not is_visual)
    visual = sum(visual_units(micro.layouts, micro.images_of))
    assert text == len(micro.text_ids) <= config.data.text_budget
    assert visual == micro.num_tiles * ROWS <= config.data.visual_budget
    assert all(rows > 0 for layout in micro.layouts for _, rows in layout)
    if micro.tiles is not None:
        assert micro.tiles.dtype == torch.uint8
        assert micro.tiles.shape == (micro.num_tiles, 3, 56, 56)
        assert micro.num_tiles > 0


def test_a_step_holds_its_samples_once(
    make_config: MakeConfig, toy_tokenizer: SentencePieceTokenizer
) -> None:
    config = make_config(global_batch_size=12)
    with opened(config, toy_tokenizer) as pipeline:
        assert pipeline.num_samples == 40
        seen: list[str] = []
        for step, batch in zip(range(10), pipeline, strict=False):
            assert batch.step == step
            assert len(batch.sample_ids) == 12
            samples = by_sample(batch)
            assert sorted(samples) == sorted(set(batch.sample_ids))
            for micro in batch.microbatches:
                check_form(micro, config)
            seen += batch.sample_ids
        for epoch in range(3):  # 120 samples are three whole epochs
            assert sorted(seen[epoch * 40 : (epoch + 1) * 40]) == sorted(f"r{i}" for i in range(40))


def test_images_belong_to_their_samples(
    make_config: MakeConfig, toy_tokenizer: SentencePieceTokenizer
) -> None:
    with opened(make_config(), toy_tokenizer) as pipeline:
        for step in range(4):
            for name, (layout, _, _, pixels) in by_sample(pipeline.global_batch(step)).items():
                number = int(name[1:])
                first = [tile[0][0][0] for tile in pixels or []]
                if number % 10 == 3:
                    assert first == []
                    assert len(layout) == 1
                elif number % 10 == 7:
                    assert first == [number, number - 1]
                else:
                    assert first == [number]


@pytest.mark.parametrize("dp_size", [2, 3, 4])
def test_ranks_share_one_plan(
    make_config: MakeConfig, toy_tokenizer: SentencePieceTokenizer, dp_size: int
) -> None:
    config = make_config()
    with opened(config, toy_tokenizer) as alone:
        whole = [alone.global_batch(step) for step in range(3)]
    parts: list[list[GlobalBatch]] = []
    for rank in range(dp_size):
        where = {"dp_rank": rank, "dp_size": dp_size, "microbatch_multiple": 2}
        with opened(config, toy_tokenizer, **where) as pipeline:
            parts.append([pipeline.global_batch(step) for step in range(3)])
    for step, expected in enumerate(whole):
        batches = [part[step] for part in parts]
        counts = {len(batch.microbatches) for batch in batches}
        assert len(counts) == 1
        assert counts.pop() % 2 == 0
        union: dict[str, tuple[Any, ...]] = {}
        for batch in batches:
            assert batch.sample_ids == expected.sample_ids
            mine = by_sample(batch)
            assert not union.keys() & mine.keys()
            union |= mine
        assert union == by_sample(expected)


def test_packing_does_not_change_samples(
    make_config: MakeConfig, toy_tokenizer: SentencePieceTokenizer
) -> None:
    with opened(make_config(), toy_tokenizer) as pipeline:
        small = pipeline.global_batch(1)
    with opened(make_config(text_budget=2000, visual_budget=2000), toy_tokenizer) as pipeline:
        large = pipeline.global_batch(1)
    assert len(small.microbatches) > len(large.microbatches) == 1
    assert by_sample(small) == by_sample(large)


def test_ranks_without_pixels_open_no_image(
    make_config: MakeConfig, toy_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    with opened(make_config(), toy_tokenizer) as pipeline:
        with_pixels = pipeline.global_batch(0)
    config = _copied(make_config(), tmp_path)
    with opened(config, toy_tokenizer, needs_pixels=False) as pipeline:
        shutil.rmtree(tmp_path / "images")
        batch = pipeline.global_batch(0)
    assert batch.failures == ()
    assert all(micro.tiles is None for micro in batch.microbatches)
    for mine, theirs in zip(batch.microbatches, with_pixels.microbatches, strict=True):
        assert mine.num_tiles == theirs.num_tiles
        assert mine.layouts == theirs.layouts
        assert torch.equal(mine.text_ids, theirs.text_ids)


def test_steps_may_jump_and_come_back(
    make_config: MakeConfig, toy_tokenizer: SentencePieceTokenizer
) -> None:
    with opened(make_config(), toy_tokenizer) as pipeline:
        straight = {step: by_sample(pipeline.global_batch(step)) for step in range(8)}
    for depth in (0, 1, 5):
        with opened(make_config(prefetch=depth), toy_tokenizer) as pipeline:
            for step in (5, 6, 2, 3, 3, 7, 0):
                batch = pipeline.global_batch(step)
                assert batch.step == step
                assert by_sample(batch) == straight[step]


def test_prefetch_runs_ahead_but_not_further() -> None:
    built: list[int] = []
    reached = threading.Event()

    def build(step: int) -> Any:
        assert threading.current_thread() is not threading.main_thread()
        built.append(step)
        if step == 14:
            reached.set()
        return step

    prefetcher = Prefetcher(build, 3)
    assert prefetcher.get(10) == 10
    assert reached.wait(30)
    # 10 is handed out, 11 to 13 are ready, 14 is made and waits for a place.
    time.sleep(0.2)
    assert built == [10, 11, 12, 13, 14]
    prefetcher.close()
    assert built == [10, 11, 12, 13, 14]


def test_a_pipeline_makes_its_batches_ahead(
    make_config: MakeConfig, toy_tokenizer: SentencePieceTokenizer
) -> None:
    def threads() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "prefetch"]

    with opened(make_config(prefetch=3), toy_tokenizer) as pipeline:
        assert pipeline.global_batch(10).step == 10
        assert len(threads()) == 1
    assert not threads()


def _copied(config: Config, tmp_path: Path) -> Config:
    """The toy data in a folder of its own, to be spoilt."""
    shutil.copytree(config.data.image_folder, tmp_path / "images")
    shutil.copy(config.data.annotations, tmp_path / "toy.json")
    data = dataclasses.replace(
        config.data,
        annotations=str(tmp_path / "toy.json"),
        image_folder=str(tmp_path / "images"),
    )
    return dataclasses.replace(config, data=data)


@pytest.mark.parametrize("depth", [0, 2])
def test_a_bad_image_is_grey_and_a_failure_at_its_step_only(
    make_config: MakeConfig, toy_tokenizer: SentencePieceTokenizer, tmp_path: Path, depth: int
) -> None:
    config = _copied(make_config(prefetch=depth), tmp_path)
    with opened(config, toy_tokenizer) as pipeline:
        whole = {}
        for step in range(4):
            whole |= {step: by_sample(pipeline.global_batch(step))}
    # Lost after the index was made: shapes are known, pixels are not.
    (tmp_path / "images" / "11.png").unlink()
    with opened(config, toy_tokenizer) as pipeline:
        for step in range(4):  # 48 samples: one whole epoch and a bit
            batch = pipeline.global_batch(step)
            found = by_sample(batch)
            assert ("r11" in found) == bool(batch.failures)
            for failure in batch.failures:
                assert (failure.id, failure.path, failure.stage) == ("r11", "11.png", "read")
                assert "annotation 'r11': image '11.png' does not exist" in failure.reason
                assert found["r11"][0] == whole[step]["r11"][0]
                assert set(np.array(found["r11"][3]).ravel()) == {127}
                masked = [mask(micro, {failure.sample}) for micro in batch.microbatches]
                batch.microbatches = masked
                for name, sample in by_sample(batch).items():
                    if name == "r11":
                        assert set(sample[2]) == {-100}
                    else:
                        assert sample == found[name] == whole[step][name]


def test_a_record_that_changed_under_the_run_is_a_failure(
    make_config: MakeConfig, toy_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    config = _copied(make_config(global_batch_size=40), tmp_path)
    path = Path(config.data.annotations)
    with opened(config, toy_tokenizer) as pipeline:
        whole = by_sample(pipeline.global_batch(0))
        text = path.read_text()
        with open(path, "r+") as file:  # in place: the run has the file open
            file.write(text.replace("which?", r"\n\n\n", 1))
        batch = pipeline.global_batch(0)
    (failure,) = batch.failures
    assert failure.id == "r0" and "no longer the one that was indexed" in failure.reason
    found = by_sample(batch)
    assert found["r0"][0] == whole["r0"][0]
    assert set(found["r0"][2]) == {-100}
    assert {name: found[name] for name in whole if name != "r0"} == {
        name: whole[name] for name in whole if name != "r0"
    }


def test_only_the_rank_that_meets_a_bad_image_reports_it(
    make_config: MakeConfig, toy_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    config = _copied(make_config(global_batch_size=40), tmp_path)
    found = []
    for rank in range(2):
        with opened(config, toy_tokenizer, dp_rank=rank, dp_size=2) as pipeline:
            if rank == 0:
                (tmp_path / "images" / "11.png").unlink()
            found += pipeline.global_batch(0).failures
    assert [failure.id for failure in found] == ["r11"]


def test_what_the_index_finds_unusable_takes_no_part(
    make_config: MakeConfig, toy_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    config = _copied(make_config(global_batch_size=39, max_bad_share=0.1), tmp_path)
    (tmp_path / "images" / "11.png").unlink()
    with opened(config, toy_tokenizer) as pipeline:
        assert pipeline.num_samples == 39
        before = pipeline.identity
        assert sorted(pipeline.global_batch(0).samples) == [n for n in range(40) if n != 11]
        ((entry),) = pipeline.index.bad()
    assert (entry["sample"], entry["id"], entry["path"]) == (11, "r11", "11.png")
    assert entry["stage"] == "image" and "does not exist" in entry["reason"]
    strict = dataclasses.replace(config.data, max_bad_share=0.0)
    message = "1 of 40 samples are unusable, data.max_bad_share=0 allows 0: .*toy.json' line 1 "
    with (
        pytest.raises(DataError, match=message),
        opened(dataclasses.replace(config, data=strict), toy_tokenizer),
    ):
        pass
    # Fixed: found when the index is opened next.
    shutil.copy(tmp_path / "images" / "12.png", tmp_path / "images" / "11.png")
    with opened(dataclasses.replace(config, data=strict), toy_tokenizer) as pipeline:
        assert pipeline.num_samples == 40
        assert pipeline.identity != before


def _with_long_samples(
    config: Config, tmp_path: Path, policy: str, record: Callable[..., dict[str, Any]]
) -> Config:
    """Adds a sample of long text (L), one of too many images (V), one of a long question (Q)."""
    records = json.loads(Path(config.data.annotations).read_text())[:10]
    records.append(record("L", ["00.png"], "<image>\nwhich?", "7 " * 300))
    records.append(record("V", ["00.png"] * 5, "<image>" * 5, "7"))
    records.append(record("Q", ["00.png"], "<image>" + "7 " * 300, "7"))
    (tmp_path / "long.json").write_text(json.dumps(records))
    data = dataclasses.replace(
        config.data,
        annotations=str(tmp_path / "long.json"),
        over_budget=policy,
        max_skipped_share=0.5,
    )
    return dataclasses.replace(config, data=data)


def test_over_budget_skip(
    make_config: MakeConfig,
    toy_tokenizer: SentencePieceTokenizer,
    tmp_path: Path,
    record: Callable[..., dict[str, Any]],
) -> None:
    config = _with_long_samples(make_config(global_batch_size=13), tmp_path, "skip", record)
    with opened(config, toy_tokenizer) as pipeline:
        batch = pipeline.global_batch(0)
    assert {sample.id for sample in batch.skipped} == {"L", "V", "Q"}
    assert {sample.stage for sample in batch.skipped} == {"budget"}
    assert batch.truncated == ()
    assert len(batch.sample_ids) == 13
    assert set(by_sample(batch)) == set(batch.sample_ids) - {"L", "V", "Q"}


def test_over_budget_truncate(
    make_config: MakeConfig,
    toy_tokenizer: SentencePieceTokenizer,
    tmp_path: Path,
    record: Callable[..., dict[str, Any]],
) -> None:
    config = _with_long_samples(make_config(global_batch_size=13), tmp_path, "truncate", record)
    with opened(config, toy_tokenizer) as pipeline:
        batch = pipeline.global_batch(0)
    # V stays too large without its text; nothing of Q's answer would be left.
    assert {sample.id for sample in batch.skipped} == {"V", "Q"}
    assert batch.truncated == ("L",)
    layout, ids, labels, _ = by_sample(batch)["L"]
    assert len(ids) == config.data.text_budget
    assert sum(rows for is_visual, rows in layout if is_visual) == ROWS
    assert labels[-1] == -100
    assert labels[-2] == ids[-1]


def test_over_budget_error(
    make_config: MakeConfig,
    toy_tokenizer: SentencePieceTokenizer,
    tmp_path: Path,
    record: Callable[..., dict[str, Any]],
) -> None:
    config = _with_long_samples(make_config(global_batch_size=13), tmp_path, "error", record)
    message = r"annotation '[LVQ]' has \d+ text and \d+ visual rows"
    with opened(config, toy_tokenizer) as pipeline, pytest.raises(DataError, match=message):
        pipeline.global_batch(0)


def test_a_step_of_nothing_but_skipped_samples_has_empty_packs(
    make_config: MakeConfig,
    toy_tokenizer: SentencePieceTokenizer,
    tmp_path: Path,
    record: Callable[..., dict[str, Any]],
) -> None:
    records = [record(f"L{n}", ["00.png"], "<image>\nwhich?", "7 " * 300) for n in range(9)]
    records.append(record("short", ["00.png"], "<image>\nwhich?", "7"))
    (tmp_path / "long.json").write_text(json.dumps(records))
    config = make_config(
        global_batch_size=5, annotations=str(tmp_path / "long.json"), max_skipped_share=0.9
    )
    with opened(config, toy_tokenizer, microbatch_multiple=2) as pipeline:
        # Of the two steps of an epoch one has the sample that fits.
        batch, other = sorted(map(pipeline.global_batch, (0, 1)), key=lambda b: -len(b.skipped))
    assert (len(batch.skipped), len(other.skipped)) == (5, 4)
    assert [micro.num_samples for micro in batch.microbatches] == [0, 0]
    for micro in batch.microbatches:
        assert (micro.layouts, micro.num_tiles, micro.tiles) == ((), 0, None)
        assert micro.text_ids.shape == micro.labels.shape == (0,)
        assert micro.text_ids.dtype == torch.int64


def test_the_fingerprint_knows_annotations_tokenizer_and_template(
    make_config: MakeConfig, toy_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    def fingerprint(config: Config) -> str:
        with opened(config, toy_tokenizer, needs_pixels=False) as pipeline:
            return pipeline.identity

    same = fingerprint(make_config())
    assert fingerprint(make_config(text_budget=900, global_batch_size=3, seed=9)) == same
    assert fingerprint(make_config(template="gemma")) != same
    copy = _copied(make_config(), tmp_path)
    assert fingerprint(copy) == same  # what counts is the content
    path = Path(copy.data.annotations)
    path.write_text(path.read_text().replace("which?", "whose?", 1))
    assert fingerprint(copy) != same
    halved = SourceConfig(copy.data.annotations, copy.data.image_folder, weight=0.5)
    data = dataclasses.replace(make_config().data, sources=(halved,))
    assert fingerprint(dataclasses.replace(copy, data=data)) != fingerprint(copy)


def test_settings_that_cannot_run(
    make_config: MakeConfig,
    toy_tokenizer: SentencePieceTokenizer,
    tmp_path: Path,
    record: Callable[..., dict[str, Any]],
) -> None:
    def build(config: Config) -> None:
        with opened(config, toy_tokenizer):
            pass

    small = make_config()
    model = dataclasses.replace(small.model, llm=LlmConfig(vocab_size=100))
    with pytest.raises(ConfigError, match=r"model.llm.vocab_size \(100\) is smaller"):
        build(dataclasses.replace(small, model=model))
    with pytest.raises(ConfigError, match="data.template: 'vicuna' is unknown"):
        build(make_config(template="vicuna"))
    with pytest.raises(DataError, match="^data.image_folder: '.*nowhere' does not exist"):
        build(make_config(image_folder=str(tmp_path / "nowhere")))
    talk = [record("t", [], "a", "b", "c", "d")]
    (tmp_path / "talk.json").write_text(json.dumps(talk))
    place = r"line 1 \(index 0, form llava\) sample 't'"
    with pytest.raises(DataError, match=rf"{place}: template 'plain' holds one .* 4 turns"):
        build(make_config(annotations=str(tmp_path / "talk.json"), template="plain"))
    never = make_config(build_index=False, index_dir=str(tmp_path / "none"))
    with pytest.raises(DataError, match="cannot be used: it is absent; data.build_index is false"):
        build(never)


def test_imports_no_megatron() -> None:
    code = (
        "import sys, dattn_mcore.data.pipeline, dattn_mcore.data.digits, dattn_mcore.data.tokenizer;"
        "sys.exit(any(name.split('.')[0] == 'megatron' for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
