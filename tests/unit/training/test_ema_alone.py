"""The running mean of the weights on one process: its steps, its checkpoint, its export."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dattn_mcore.architectures.tables import model_table
from dattn_mcore.checkpoint.load import choose_checkpoint
from dattn_mcore.checkpoint.mixing import split
from dattn_mcore.errors import CheckpointError
from dattn_mcore.training.ema import Ema, start_ema
from tests.unit.checkpoint.runs import small_run
from tests.unit.convert.convert_helpers import make_tokenizer, small_config
from tools.checkpoint_convert.average import AverageOptions, average
from tools.checkpoint_convert.dist_checkpoint import DistCheckpoint
from tools.checkpoint_convert.mcore_to_hf import ExportOptions, convert
from tools.checkpoint_convert.raw_folders import same_bits
from tools.checkpoint_convert.safetensors_folder import SafetensorsFolder

DECAY = 0.75


def done(step, loss=1.0):
    return SimpleNamespace(step=step, result=SimpleNamespace(loss=loss))


def wrapped(run):
    """As Megatron-Core's DDP, which the optimizer has around the same parameters already."""
    return [SimpleNamespace(module=chunk) for chunk in run.chunks]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """In bf16, with a frozen tower."""
    config = small_config(make_tokenizer(tmp_path_factory.mktemp("tokenizer")), "gemma2")
    trains = ("projector", "llm")
    train = replace(config.train, precision="bf16", trains=trains, ema_decay=DECAY, ema_start=1)
    return replace(config, train=train)


@pytest.fixture(scope="module")
def saved(config, tmp_path_factory):
    """A run folder with step 3, and the mean that was expected, by the names of parameters."""
    root = tmp_path_factory.mktemp("ema") / "run/checkpoints"
    with small_run(root, config) as run:
        ema = Ema(config, wrapped(run))
        run.saver.beside = ema.sharded
        (means,) = ema.means
        learn = {name for name, p in run.chunks[0].named_parameters() if p.requires_grad}
        assert set(means) == learn and not any(name.startswith("vision.") for name in learn)
        assert {mean.dtype for mean in means.values()} == {torch.float32}
        want = {}
        for step in (1, 2, 3):
            run.step(step)
            ema.after_step(done(step))
            before = {name: mean.clone() for name, mean in means.items()}
            ema.after_step(done(step, loss=None))  # nothing to learn from: nothing changes
            assert all(torch.equal(mean, before[name]) for name, mean in means.items())
            now = {name: weight.double() for name, weight in run.weights().items()}
            if step == 1:  # before it begins
                want = {name: now[name] for name in learn}
            else:
                want = {name: DECAY * want[name] + (1 - DECAY) * now[name] for name in learn}
        for name, mean in means.items():
            # Two roundings of float32 in each of two steps.
            bound = 3e-7 * float(want[name].abs().max())
            assert float((mean.double() - want[name]).abs().max()) <= bound, name
            assert not torch.equal(mean, now[name].float()), name
        run.saver.save(3)
        return root.parent, {name: mean.clone() for name, mean in means.items()}


def test_it_is_saved_and_goes_on_bit_for_bit(saved, config, caplog):
    """And one that is not asked for is dropped in one line."""
    caplog.set_level(logging.INFO, "dattn_mcore.training.ema")
    folder, means = saved
    with small_run(folder / "checkpoints", config) as run:
        found = choose_checkpoint(folder)
        model = wrapped(run)
        ema = start_ema(config, model, run.groups, found)
        assert not caplog.records
        for name, mean in ema.means[0].items():
            assert torch.equal(mean, means[name]), name
        without = replace(config, train=replace(config.train, ema_decay=None, ema_start=0))
        assert start_ema(without, model, run.groups, found) is None
        assert start_ema(without, model, run.groups, None) is None
    assert [record.getMessage() for record in caplog.records] == [
        "the running mean of the weights in step_00000003 ends here (train.ema_decay is null)"
    ]


def test_it_begins_with_the_weights_of_a_checkpoint_that_has_none(config, tmp_path, caplog):
    caplog.set_level(logging.INFO, "dattn_mcore.training.ema")
    with small_run(tmp_path / "checkpoints", config) as run:
        run.saver.save(7)
        model = wrapped(run)
        ema = start_ema(config, model, run.groups, choose_checkpoint(tmp_path))
        for name, mean in ema.means[0].items():
            assert torch.equal(mean, run.weights()[name].float()), name
    assert [record.getMessage() for record in caplog.records] == [
        "step_00000007 has no running mean of the weights (train.ema_decay): it starts from the "
        "weights of step 7"
    ]
    with pytest.raises(CheckpointError, match="holds no running mean of the weights"):
        convert(tmp_path, tmp_path / "hf", ExportOptions(ema=True))


def test_it_is_exported_and_becomes_weights(saved, config, tmp_path):
    """With the converter's check, which must load the rounded mean and not the weights."""
    folder, _ = saved
    options = ExportOptions(tokenizer=config.data.tokenizer, check=True, ema=True)
    done = convert(folder, tmp_path / "hf", options)
    assert "logits differ from the trainer's" in done.checked
    ema, plain = DistCheckpoint(folder, ema=True), DistCheckpoint(folder)
    exported, off = SafetensorsFolder(tmp_path / "hf"), 0.0
    for entry in model_table(ema.config.model):
        for layer in entry.steps() if entry.key else ():
            mean, weight = ema.read_exact(entry.key, layer), plain.read(entry.key, layer)
            off = max(off, float((mean - weight).abs().max()))
            for name, part in zip(entry.names(layer), split(entry, mean), strict=True):
                assert same_bits(exported.read(name), part.to(weight.dtype)), name
    assert off > 1e-3
    options = AverageOptions(dtype="float32", ema=True)
    average([folder / "checkpoints/step_00000003"], tmp_path / "mean", options)
    mean = DistCheckpoint(tmp_path / "mean")
    for key in mean.shapes:
        assert same_bits(mean.read(key), ema.read_exact(key).float()), key
