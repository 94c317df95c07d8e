"""Bytes on disk that are predicted, against those of a checkpoint that was saved."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dattn_mcore.checkpoint.metadata import read_metadata
from dattn_mcore.config.load import from_dict
from dattn_mcore.config.schema import CheckpointConfig, OptimGroup
from dattn_mcore.plan.disk import checkpoint_size, disk_lines
from dattn_mcore.training.ema import Ema
from tests.unit.checkpoint.runs import small_run
from tests.unit.convert.convert_helpers import make_tokenizer, small_config
from tools.checkpoint_convert.mcore_to_hf import ExportOptions, convert
from tools.checkpoint_convert.safetensors_folder import SafetensorsFolder

# `torch.save` pads and describes each tensor, and the small files of a checkpoint come on top.
A_TENSOR, A_CHECKPOINT = 4096, 200_000
HALF = (
    OptimGroup(patterns=("vision.layers.{1..1}",), trains=True),
    OptimGroup(patterns=("llm.layers.0", "embedding"), trains=False),
)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["mistral", "gemma2"])
@pytest.mark.parametrize("groups", [(), HALF], ids=["parts", "groups"])
def test_a_checkpoint_and_its_export_take_what_was_said(tmp_path, family, precision, groups):
    config = small_config(make_tokenizer(tmp_path), family)
    trains = ("projector", "llm")
    train = replace(config.train, precision=precision, ema_decay=0.9, trains=trains)
    config = replace(config, train=train, optim=replace(config.optim, groups=groups))
    with small_run(tmp_path / "run/checkpoints", config) as run:
        model = [SimpleNamespace(module=chunk) for chunk in run.chunks]
        run.saver.beside = Ema(config, model).sharded
        folder = run.saver.save(1)
    size, found = checkpoint_size(config), {"weights": 0, "optimizer": 0, "ema": 0, "rng": 0}
    stored = read_metadata(folder).state_dict_metadata
    for key, tensor in stored.items():
        assert isinstance(tensor, TensorStorageMetadata)
        kind = key.split(".")[0] if key.startswith(("optimizer.", "ema.", "rng.")) else "weights"
        found[kind] += tensor.size.numel() * tensor.properties.dtype.itemsize
    assert (size.weights, size.ema) == (found["weights"], found["ema"])
    assert size.optimizer == found["optimizer"]
    on_disk = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert size.total < on_disk < size.total + A_TENSOR * 3 * len(stored) + A_CHECKPOINT
    convert(folder, tmp_path / "hf", ExportOptions(tokenizer=config.data.tokenizer))
    exported = SafetensorsFolder(tmp_path / "hf")
    assert size.export == sum(
        shape_size(exported.shapes[name]) * dtype.itemsize
        for name, dtype in exported.dtypes.items()
    )


def shape_size(shape):
    size = 1
    for length in shape:
        size *= length
    return size


def test_checkpoints_that_wait_for_their_scores():
    """They are in use: one where training waits for it, else two that wait beside the next."""
    config = from_dict({"train": {"steps": 1000}, "scores": {"questions": "own.jsonl"}})
    config = replace(config, checkpoint=replace(CheckpointConfig(), save_interval=100))
    lines = disk_lines(config)
    assert "at most 5 stay (2 newest + 3 being scored)" in lines[0]
    assert lines[1].startswith("disk: the export that answers questions takes ")
    scores = replace(config.scores, wait=True, keep_export=True)
    lines = disk_lines(replace(config, scores=scores))
    assert "at most 3 stay (2 newest + 1 being scored)" in lines[0]
    assert lines[1].endswith("; each scored checkpoint leaves one")


@pytest.mark.parametrize(
    ("checkpoint", "steps", "said"),
    [
        ({}, 1000, ["2 stay (2 newest): 63.0 MB with the one that is being written"]),
        ({"keep": 99}, 1000, ["10 stay (all that are saved)"]),
        (
            {"keep_every": 500, "keep_best": 3, "also_export": True},
            1000,
            [
                "8 stay (2 newest + 3 best + 2 of every 500 steps + 1 being exported): 189.0 MB",
                "8 stay: 47.2 MB",
            ],
        ),
        (
            {"keep_every": 500},
            None,
            ["2 stay (2 newest + every 500 steps)", "and one more each 500 steps"],
        ),
    ],
)
def test_what_is_said(monkeypatch, checkpoint, steps, said):
    """Of a model whose checkpoint takes 21 MB and whose export 5.25 MB."""
    from dattn_mcore.plan import disk

    size = disk.CheckpointSize(5_250_000, 15_750_000, 0, 5_250_000)
    monkeypatch.setattr(disk, "checkpoint_size", lambda config: size)
    config = from_dict({"train": {"steps": steps}})
    config = replace(
        config, checkpoint=replace(CheckpointConfig(), save_interval=100, **checkpoint)
    )
    lines = disk_lines(config)
    assert len(lines) == 1 + config.checkpoint.also_export
    assert "a checkpoint takes 21.0 MB (weights 5.2 MB, optimizer 15.8 MB)" in lines[0]
    for words in said:
        assert any(words in line for line in lines), (words, lines)
