"""Answers are not begun with a model whose cache, batches or logits are broken."""

import functools
import importlib.util

import pytest
import torch
import transformers

import dattn_mcore
from dattn_mcore.evaluation.__main__ import main
from dattn_mcore.evaluation.generation import Generator, Request
from dattn_mcore.evaluation.images import Picture
from dattn_mcore.evaluation.self_check import (
    BOUND,
    SelfCheckError,
    compare_generation,
    in_float32,
    spread_difference,
)
from dattn_mcore.hf import DattnForConditionalGeneration
from dattn_mcore.hf.configuration_dattn import TESTED_TRANSFORMERS
from dattn_mcore.hf.shared_images_dattn import SharedImages
from tests.unit.hf.hf_models import IMAGE, ids, make_model, pixels


def breaks(monkeypatch, change):
    """Changes what `forward` is given, or gives."""
    whole = DattnForConditionalGeneration.forward

    @functools.wraps(whole)
    def broken(self, *args, **kwargs):
        return change(functools.partial(whole, self), args, kwargs)

    monkeypatch.setattr(DattnForConditionalGeneration, "forward", broken)


def without_cache(forward, args, kwargs):
    kept = {n: v for n, v in kwargs.items() if n not in ("past_key_values", "cache")}
    return forward(*args, **kept)


def without_mask(forward, args, kwargs):
    return forward(*args, **{n: v for n, v in kwargs.items() if n != "attention_mask"})


def not_finite(forward, args, kwargs):
    out = forward(*args, **kwargs)
    out.logits = out.logits * float("nan")
    return out


def refuses(forward, args, kwargs):
    raise TypeError("forward() got an unexpected\nkeyword argument 'cache'")


BROKEN = [
    (without_cache, "generation with the cache goes wrong: at new token 2 of 4 its logits are off"),
    (without_mask, "generation in a batch goes wrong: at new token 1 of 4 its logits are off by"),
    (not_finite, "at new token 1 of 4 its logits are not finite"),
    (refuses, "it cannot be run (TypeError: forward() got an unexpected keyword argument 'cache')"),
]


def line_of(error, model, message):
    oldest, newest = TESTED_TRANSFORMERS
    assert f"--model {model} fails its self-check: " in error and message in error
    assert (
        f"this is dattn_mcore {dattn_mcore.__version__} with transformers "
        f"{transformers.__version__}, tested with transformers {oldest} to {newest}: "
    ) in error
    assert "install a tested release, or a newer dattn_mcore" in error and "\n" not in error


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_a_broken_model_answers_nothing(tiny_model, tmp_path, monkeypatch, capsys, change, message):
    """`run` and `answer` end with 2 and one line; the run's folder stays free."""
    breaks(monkeypatch, change)
    out, model = tmp_path / "out", tiny_model / "tiny"
    arguments = [f"--model={model}", "--device=cpu", "--batch-size=2"]
    data = [f"--data={tiny_model / 'val'}", f"--out={out}", "--benchmarks=gqa,pope"]
    assert main(["run", *arguments, *data]) == 2
    line_of(capsys.readouterr().err.strip().splitlines()[-1], model, message)
    assert not (out / "run.json").exists() and not (out / "answers").exists()

    questions = tiny_model / "val/gqa/llava_gqa_testdev_balanced.jsonl"
    files = [f"--questions={questions}", f"--image-folder={tiny_model / 'val/gqa/data/images'}"]
    assert main(["answer", *arguments, *files, f"--answers={tmp_path / 'a.jsonl'}"]) == 2
    line_of(capsys.readouterr().err.strip().splitlines()[-1], model, message)
    assert not (tmp_path / "a.jsonl").exists()


@pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed"
)
def test_lmms_eval_ends_with_the_line(tiny_model, monkeypatch):
    """It would turn any other exception into exit status 0."""
    from lmms_eval.api.instance import Instance

    from dattn_mcore.evaluation.lmms_eval_model import DattnMcore

    model = DattnMcore(str(tiny_model / "tiny"), device="cpu")
    model.task_dict = {"t": {"s": [[]]}}
    request = Instance(
        request_type="generate_until",
        arguments=("a?", {"max_new_tokens": 2}, lambda doc: doc, 0, "t", "s"),
        idx=0,
        metadata={"task": "t", "doc_id": 0, "repeats": 1},
    )
    assert len(model.generate_until([request])) == 1
    model = DattnMcore(str(tiny_model / "tiny"), device="cpu")
    model.task_dict = {"t": {"s": [[]]}}
    breaks(monkeypatch, without_cache)
    with pytest.raises(SystemExit) as ended:
        model.generate_until([request])
    line_of(ended.value.code, tiny_model / "tiny", BROKEN[0][1])


@pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed"
)
def test_lmms_eval_hears_of_odd_answers(tiny_model, caplog):
    """All the same, for one question that is asked ten times; not of two different ones."""
    from lmms_eval.api.instance import Instance

    from dattn_mcore.evaluation.lmms_eval_model import DattnMcore

    model = DattnMcore(str(tiny_model / "tiny"), device="cpu", batch_size=10)
    model.task_dict = {"same": {"s": [[]]}, "other": {"s": [[]]}}
    asked = [("same", "a?")] * 10 + [("other", f"{number}?") for number in range(10)]
    requests = [
        Instance(
            request_type="generate_until",
            arguments=(text, {"max_new_tokens": 4}, lambda doc: doc, 0, task, "s"),
            idx=0,
            metadata={"task": task, "doc_id": 0, "repeats": 1},
        )
        for task, text in asked
    ]
    answers = model.generate_until(requests)
    assert len(set(answers[:10])) == 1 and len(set(answers[10:])) > 1
    (record,) = caplog.records
    assert record.message == f"dattn_mcore, same: all 10 answers are the same ({answers[0]!r:.60})"


def first(tiny_model):
    name = "n0.jpg"
    picture = Picture(name, tiny_model / "val/gqa/data/images" / name)
    return Request("the first", "<image>\nWhat is red?", (picture,))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_whole_model_passes(tiny_model, dtype):
    """In float32 nearly exactly, whatever the model's dtype, to which it returns."""
    generator = Generator(tiny_model / "tiny", torch.device("cpu"), dtype)
    before = {name: p.clone() for name, p in generator.model.named_parameters()}
    line = generator.self_check(first(tiny_model), batch_size=2)
    assert "with and without the cache, alone and in a batch agree" in line
    assert float(line.split("differ by ")[1].split(" ")[0]) < 1e-5
    assert "in a batch" not in generator.self_check(first(tiny_model), batch_size=1)
    assert len({p.dtype for p in before.values()}) == (2 if dtype == "bfloat16" else 1)
    for name, parameter in generator.model.named_parameters():
        assert parameter.dtype == before[name].dtype and torch.equal(parameter, before[name]), name


def test_roundings_of_bf16_are_no_fault():
    """A deep model with sharp attention, whose logits in bf16 say nothing about its cache."""
    for seed in range(3):
        model = make_model(seed=seed, text={"num_hidden_layers": 20}).to(torch.bfloat16)
        inputs = {
            "input_ids": ids(1, 5, IMAGE, *range(20, 40)),
            "pixel_values": pixels(1).bfloat16().float(),
        }
        assert compare_generation(model, inputs).difference < BOUND / 10
        assert model.lm_head.weight.dtype == torch.bfloat16
    with torch.no_grad(), in_float32(model):
        wide = model(**inputs).logits
    with torch.no_grad():
        expected = model.float()(**inputs).logits
    assert spread_difference(wide, expected) < 1e-3 and wide.dtype == torch.float32


def test_a_lost_cache_is_found_in_bf16(tiny_model, monkeypatch):
    generator = Generator(tiny_model / "tiny", torch.device("cpu"), "bfloat16")
    breaks(monkeypatch, without_cache)
    with pytest.raises(SelfCheckError, match="with the cache goes wrong") as raised:
        generator.self_check(first(tiny_model), batch_size=1)
    assert float(str(raised.value).split("off by ")[1].split(" ")[0]) > 0.1
    breaks(monkeypatch, refuses)  # what a module widened for a pass that fails is put back, too
    with pytest.raises(SelfCheckError, match="cannot be run"):
        generator.self_check(first(tiny_model), batch_size=1)
    assert generator.model.lm_head.weight.dtype == torch.bfloat16


def test_lost_images_of_a_batch_are_found(tiny_model, monkeypatch):
    """A batch reads one copy of the images that are kept; here nobody reads them."""
    generator = Generator(tiny_model / "tiny", torch.device("cpu"), image_cache_gib=0.1)
    whole = generator.self_check(first(tiny_model), batch_size=2)
    assert "and with the images from their cache" in whole
    monkeypatch.setattr(SharedImages, "readers", lambda *_: ())
    with pytest.raises(SelfCheckError, match="in a batch and with image_cache goes wrong"):
        generator.self_check(first(tiny_model), batch_size=2)


def test_spread_difference():
    """A share of the row's spread, the worst row counts; infinite where not finite."""
    expected = torch.tensor([[1.0, 3.0], [5.0, 5.0]])
    assert spread_difference(expected, expected) == 0
    found = torch.tensor([[1.0, 3.1], [5.0, 5.0]])
    assert spread_difference(found, expected) == pytest.approx(0.1 / 2**0.5)
    assert spread_difference(expected + 100, expected) == float("inf")  # a row without spread
    assert spread_difference(found / 0, expected) == float("inf")
