"""Which answers are learned: `data.loss_on`, `loss` of a turn, `weight` of a sample, documents."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dattn_mcore.config.schema import Config, MappingConfig, SourceConfig
from dattn_mcore.data.index.identity import difference, fingerprint_of, identity_of
from dattn_mcore.data.index.store import open_index
from dattn_mcore.data.pipeline import DataPipeline
from dattn_mcore.data.record_runs import runs_of
from dattn_mcore.data.sources.record import Sample
from dattn_mcore.data.templates import encode_sample
from dattn_mcore.data.tokenizer import SentencePieceTokenizer
from dattn_mcore.errors import DataError

MakeConfig = Callable[..., Config]
FOUR = Sample("a", (), ("q", "7", "q", "8"))


def learned_text(tokenizer: SentencePieceTokenizer, sample: Sample, loss_on: Any = "all") -> str:
    encoded = encode_sample(runs_of(tokenizer, "mistral", sample, loss_on), 4)
    return tokenizer.decode([label for label in encoded.labels if label != -100])


@pytest.mark.parametrize(
    ("learned", "loss_on", "said"),
    [
        ((), "all", "78"),
        ((), "last", "8"),
        ((False, True), "all", "8"),
        ((True, False), "all", "7"),
        ((False, True), "last", "8"),
    ],
)
def test_which_answers_have_loss(
    toy_tokenizer: SentencePieceTokenizer, learned: tuple[bool, ...], loss_on: str, said: str
) -> None:
    sample = Sample("a", (), FOUR.turns, learned=learned)
    assert learned_text(toy_tokenizer, sample, loss_on).replace(" ", "") == said
    whole = encode_sample(runs_of(toy_tokenizer, "mistral", FOUR), 4).text_ids
    assert encode_sample(runs_of(toy_tokenizer, "mistral", sample, loss_on), 4).text_ids == whole


@pytest.mark.parametrize(
    ("turns", "learned", "what"),
    [(FOUR.turns, (True, False), "has 'loss' false"), (("q", "7", "q", " "), (), "is empty")],
)
def test_a_last_answer_that_cannot_be_learned(
    toy_tokenizer: SentencePieceTokenizer,
    turns: tuple[str, ...],
    learned: tuple[bool, ...],
    what: str,
) -> None:
    with pytest.raises(DataError) as raised:
        runs_of(toy_tokenizer, "mistral", Sample("a", (), turns, learned=learned), "last")
    said = f"data.loss_on is 'last', and the last answer {what}; nothing to learn"
    assert str(raised.value) == said


def test_a_document_is_learned_as_a_whole(toy_tokenizer: SentencePieceTokenizer) -> None:
    """Images that begin it stand before the token that predicts its first one."""
    sample = Sample("a", ("1", "2", "3"), ("<image><image> 7\n\n<image>\n\n8",), document=True)
    encoded = encode_sample(runs_of(toy_tokenizer, "mistral", sample, "last"), 4)
    middle = toy_tokenizer.encode("7\n\n")
    behind = toy_tokenizer.encode("\n\n8")
    ids = (toy_tokenizer.bos_id, *middle, *behind, toy_tokenizer.eos_id)
    assert encoded.text_ids == ids
    assert encoded.labels == (*ids[1:], -100)
    first, second = (False, 1 + len(middle)), (False, len(behind) + 1)
    assert encoded.layout == ((True, 8), first, (True, 4), second)


def test_documents_are_packed(
    make_config: MakeConfig,
    toy_tokenizer: SentencePieceTokenizer,
    toy_data: Path,
    tmp_path: Path,
) -> None:
    """As the index says: images where they stand, a label on every row but the last."""
    path = tmp_path / "a.jsonl"
    records = [
        {"images": ["00.png", None, "01.png"], "texts": [None, "7 8", None]},
        {"images": [None, "02.png", None], "texts": ["9", None, "7"]},
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    source = SourceConfig(annotations=str(path), image_folder=str(toy_data / "images"))
    config = make_config(
        global_batch_size=2, sources=(source,), index_dir=str(tmp_path / "index"), visual_budget=999
    )
    where = {"dp_rank": 0, "dp_size": 1, "microbatch_multiple": 1, "needs_pixels": True}
    pipeline = DataPipeline(config, toy_tokenizer, **where)
    batch = pipeline.global_batch(0)
    pipeline.close()
    (pack,) = batch.microbatches
    assert not batch.failures and pack.tiles is not None
    found = dict(zip(pack.sample_ids, pack.layouts, strict=True))
    first = [is_visual for is_visual, _ in found["a.jsonl:1"]]
    assert first == [True, False, True, False]
    assert [is_visual for is_visual, _ in found["a.jsonl:2"]] == [False, True, False]
    assert int((pack.labels == -100).sum()) == 2
    firsts = sorted(int(tile[0, 0, 0]) for tile in pack.tiles)
    assert firsts == [0, 1, 2]


def two_turns(weight: Any = None, **more: Any) -> dict[str, Any]:
    turns = [
        {"from": ("human", "gpt")[number % 2], "value": value}
        for number, value in enumerate(FOUR.turns)
    ]
    return {"conversations": turns, **({} if weight is None else {"weight": weight}), **more}


def test_weights_reach_the_micro_batch(
    make_config: MakeConfig, toy_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "a.json"
    where = {"dp_rank": 0, "dp_size": 1, "microbatch_multiple": 1, "needs_pixels": False}
    for weights in ([0.5, None, 3], [None, 1, 1.0]):
        path.write_text(json.dumps([two_turns(weight) for weight in weights]))
        config = make_config(global_batch_size=3, annotations=str(path))
        pipeline = DataPipeline(config, toy_tokenizer, **where)
        (batch,) = pipeline.global_batch(0).microbatches
        pipeline.close()
        found = dict(zip(batch.sample_ids, batch.weights, strict=False))
        expected = {f"a.json[{n}]": weight or 1.0 for n, weight in enumerate(weights)}
        assert found == (expected if 0.5 in weights else {})  # no weights: none are carried


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (0, "'weight' is 0; it must be above 0 and below 1,000,000"),
        (-1.5, "'weight' is -1.5; it must be above 0 and below 1,000,000"),
        (True, "'weight' must be a number above 0, got a boolean"),
        ("2", "'weight' must be a number above 0, got a string"),
    ],
)
def test_weights_that_are_none(
    make_config: MakeConfig,
    toy_tokenizer: SentencePieceTokenizer,
    tmp_path: Path,
    weight: Any,
    reason: str,
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([two_turns(weight)]))
    (bad,) = open_index(make_config(annotations=str(path)), toy_tokenizer).bad()
    assert bad["reason"] == reason


def test_the_index_knows_what_is_learned(
    make_config: MakeConfig, toy_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    """Another `loss_on` is another index, and other data to resume with."""
    path = tmp_path / "a.json"
    silent = two_turns()
    silent["conversations"][3]["loss"] = False
    path.write_text(json.dumps([two_turns(), silent]))
    found = {}
    for loss_on in ("all", "last"):
        config = make_config(annotations=str(path), loss_on=loss_on)
        index = open_index(config, toy_tokenizer)
        found[loss_on] = (index, identity_of(index, config.data))
    every, last = found["all"][0], found["last"][0]
    assert every.folder != last.folder
    assert every.samples["supervised"].tolist() == [2 * last.samples["supervised"][0]] + [
        int(last.samples["supervised"][0])
    ]
    assert last.usable.tolist() == [1, 0]
    assert every.samples["first_label"][0] < last.samples["first_label"][0]
    there, here = found["all"][1], found["last"][1]
    assert fingerprint_of(there) != fingerprint_of(here)
    assert "loss_on" not in there  # as before there was the setting
    assert "which answers are learned (data.loss_on)" in difference(there, here)


def test_the_form_is_part_of_what_is_resumed(
    make_config: MakeConfig, toy_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    """The same file read in two ways is two data sets; LLaVA's form is as before there were others."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"q": "q", "a": "7", "b": "8"}]))
    mappings = [MappingConfig(question="q", answer=name) for name in "ab"]
    found = []
    for mapping in mappings:
        keys = tuple({"a", "b"} - {mapping.answer})
        source = SourceConfig(annotations=str(path), mapping=mapping)
        config = make_config(sources=(source,), metadata_keys=keys, index_dir=str(tmp_path))
        found.append(identity_of(open_index(config, toy_tokenizer), config.data))
    assert fingerprint_of(found[0]) != fingerprint_of(found[1])
    assert "the form of records" in difference(found[0], found[1])
    path.write_text(json.dumps([two_turns()]))
    config = make_config(annotations=str(path))
    assert "forms" not in identity_of(open_index(config, toy_tokenizer), config.data)
