"""Runs with adapters: the same in every layout as in one process, resumed, saved alone, exported.

Over two optimizer steps with Adam's eps far above rounding (see `test_features_by_layout`);
compared are losses, gradient norms and every tensor of the adapters. That one process computes what
`peft` does is held by `test_lora_peft`.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from dattn_mcore.architectures.adapters import adapter_table
from dattn_mcore.checkpoint.metadata import read_metadata
from dattn_mcore.checkpoint.peft_folder import read_peft_folder
from dattn_mcore.config.load import from_dict, merge
from dattn_mcore.config.lora import adapters_of
from dattn_mcore.plan.disk import checkpoint_size
from tests.distributed.interrupted_jobs import train_until_killed
from tests.distributed.jobs import read_metrics, run_training
from tests.distributed.pool import WorkerError
from tests.distributed.small_models import GEMMA, QWEN2, small_config
from tests.distributed.test_watched_runs_by_layout import reported
from tools.checkpoint_convert import hf_to_mcore, mcore_to_hf
from tools.checkpoint_convert.dist_checkpoint import DistCheckpoint
from tools.checkpoint_convert.peft_out import write_peft

ALL = ["*.{q,k,v,o,gate,up,down}_proj"]
SOME = ["*.layers.{1..2}.self_attn.{q,v}_proj", "*.layers.{0..1}.mlp.gate_proj", "*.down_proj"]
BASELINE = {"attention": {"v2v": "causal", "t2v_position": "rope"}}
UNFOLDED = {"attention": {"fold_visual_projection": False}}
FULL, CHUNKS = {"train": {"recompute": "full"}}, {"train": {"recompute_visual_chunk": 24}}
FOUR = {"tp": 2, "pp": 2, "sp": True}


def lora(targets=ALL, **more):
    """The section, with updates that a difference of gradients shows in."""
    return {
        "lora": {"targets": targets, "rank": 3, "alpha": 12.0, **more},
        "train": {"trains": ["llm"], "steps": 2},
        "optim": {"eps": 1e-3, "lr": 1e-2},
    }


@pytest.fixture(scope="module")
def base_of(pool, digits, tmp_path_factory):
    """Run folders of models after one step, one for each model."""
    done = {}

    def base(model):
        key = json.dumps(model, sort_keys=True)
        if key not in done:
            done[key] = tmp_path_factory.mktemp("base")
            tree = small_config(digits, done[key], model=model, train={"steps": 1})
            assert all(pool.run(run_training, 1, tree))
        return {"checkpoint": {"init_from": str(done[key])}}

    return base


@pytest.fixture(scope="module")
def train(pool, digits, base_of, tmp_path_factory):
    """Trains adapters in a layout; returns metrics and all tensors of adapters."""

    def run(model, ranks, *sections, run_dir=None):
        run_dir = run_dir or tmp_path_factory.mktemp("run")
        tree = {"model": model}
        for section in (base_of(model), *sections):
            tree = merge(tree, section)
        tree = small_config(digits, run_dir, **tree)
        assert all(pool.run(run_training, ranks, tree))
        return read_metrics(run_dir), adapters_in(run_dir, from_dict(tree))

    return run


def adapters_in(run_dir, config):
    """Every tensor of adapters in the newest checkpoint, which holds nothing else of the llm."""
    source = DistCheckpoint(run_dir)
    table = {entry.key: entry for entry in adapter_table(config.model, adapters_of(config))}
    assert {key for key in source.shapes if key.startswith("decoder.")} == table.keys()
    found = {key: source.read(key) for key in table}
    assert all(found[key].shape == entry.mcore_shape() for key, entry in table.items())
    return found


FOUR_HEADS = {"vision": {"num_attention_heads": 4}}  # as many as tensor ranks
CASES = {
    "tp2": ({}, 2, {"tp": 2}, lora(), {}),
    "tp2-sp": ({}, 2, {"tp": 2, "sp": True}, lora(SOME, dora=True), {}),
    "pp2": ({}, 2, {"pp": 2}, lora(SOME), FULL),
    "dp2": ({}, 2, {}, lora(dora=True), CHUNKS),
    "cp2": ({}, 2, {"cp": 2}, lora(dora=True), FULL),
    "tp2-pp2-sp": ({}, 4, FOUR, lora(dora=True), CHUNKS),
    "gemma2, tp2-pp2-sp": (GEMMA, 4, FOUR, lora(), FULL),
    "gemma2, dora, tp2-sp": (GEMMA, 2, {"tp": 2, "sp": True}, lora(dora=True), UNFOLDED),
    "baseline, tp2-sp": ({}, 2, {"tp": 2, "sp": True}, merge(BASELINE, lora(SOME)), {}),
    "gemma2, baseline, pp2": (GEMMA, 2, {"pp": 2}, merge(BASELINE, lora(dora=True)), {}),
    "biases, shared groups": (
        merge(QWEN2, FOUR_HEADS),
        4,
        {"tp": 4, "sp": True},
        lora(dora=True),
        {},
    ),
    "shared groups": (FOUR_HEADS, 4, {"tp": 4}, lora(["*.{k,v,up}_proj", "*.o_proj"]), CHUNKS),
    "overlap, dp2-tp2": (
        {},
        4,
        {"tp": 2, "overlap_grad_reduce": True, "overlap_param_gather": True},
        lora(),
        {"data": {"fixed_rows": True}},
    ),
}


@pytest.fixture(scope="module")
def expected(train):
    """What one process without any of it gives; cases of one meaning share it."""
    done = {}

    def result(model, sections):
        key = json.dumps([model, sections], sort_keys=True)
        if key not in done:
            done[key] = train(model, 1, sections)
        return done[key]

    return result


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_adapters_learn_as_in_one_process(train, expected, case):
    model, ranks, layout, sections, computed = case
    rows, found = train(model, ranks, sections, computed, {"parallel": layout})
    plain, want = expected(model, sections)
    for row, other in zip(rows, plain, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        assert row["grad_norm"] > 1e-3
    assert found.keys() == want.keys()
    for key, value in want.items():
        # Rates of 1e-2 and an eps of 1e-3: rounding of 1e-7 in a gradient moves by 1e-6.
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5, msg=key)
        if key.endswith(".b"):
            assert value.abs().amax(dim=(1, 2)).gt(1e-6).all(), key  # of every layer


def test_the_projector_learns_beside_them(train, digits, tmp_path):
    """The checkpoint holds both, nothing that is frozen, and the bytes that the dry run says."""
    sections = merge(lora(SOME), {"train": {"trains": ["projector", "llm"], "steps": 1}})
    sections = merge(sections, {"checkpoint": {"init_from": "base"}})
    config = from_dict(small_config(digits, tmp_path, **sections))
    del sections["checkpoint"]
    train({}, 1, sections, run_dir=tmp_path)
    (folder,) = (tmp_path / "checkpoints").glob("step_*")
    saved = {"weights": 0, "optimizer": 0}
    for key, tensor in read_metadata(folder).state_dict_metadata.items():
        if not key.startswith("rng."):
            kind = "optimizer" if key.startswith("optimizer.") else "weights"
            saved[kind] += tensor.size.numel() * tensor.properties.dtype.itemsize
    size = checkpoint_size(config)
    assert (size.weights, size.optimizer) == (saved["weights"], saved["optimizer"])


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [(1, {}), (2, {"tp": 2, "sp": True}), (4, FOUR), (2, {"cp": 2})],
    ids=["one", "tp2-sp", "tp2-pp2", "cp2"],
)
def test_a_resumed_run_is_bitwise_the_same(pool, digits, base_of, tmp_path, ranks, parallel):
    """With dropout, whose draws go on where they were."""
    sections = merge(lora(dora=True, dropout=0.2), {"train": {"steps": 4}, "parallel": parallel})
    whole, parts = (
        small_config(digits, tmp_path / name, **merge(base_of({}), sections))
        for name in ("whole", "parts")
    )
    assert all(pool.run(run_training, ranks, whole))
    assert pool.run(train_until_killed, ranks, parts, 2) == [False] * ranks
    assert all(pool.run(run_training, ranks, parts))
    kept = ("loss", "grad_norm", "lr")
    rows, want = (read_metrics(tmp_path / name) for name in ("parts", "whole"))
    assert [[row[k] for k in kept] for row in rows] == [[row[k] for k in kept] for row in want]
    ours, theirs = (adapters_in(tmp_path / n, from_dict(whole)) for n in ("parts", "whole"))
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


def test_dropout_draws_alike_where_inputs_are_alike(train):
    """Else tensor parallel ranks would go on with other hidden states: the loss would differ.

    Without sequence parallelism all ranks of a group hold the same rows, whatever is dropped.
    """
    sections = lora(["*.{q,v,gate,up}_proj"], dropout=0.3)
    rows, _ = train({}, 2, sections, {"parallel": {"tp": 2}})
    plain, _ = train({}, 1, sections)
    assert rows[0]["loss"] == pytest.approx(plain[0]["loss"], abs=1e-5)
    assert rows[1]["loss"] == pytest.approx(plain[1]["loss"], abs=1e-5)
    no_dropout, _ = train({}, 1, lora(["*.{q,v,gate,up}_proj"]))
    assert abs(plain[1]["loss"] - no_dropout[1]["loss"]) > 1e-6


def test_another_base_or_other_adapters_are_refused(pool, digits, base_of, tmp_path):
    base = base_of({})
    other = tmp_path / "other"
    tree = small_config(digits, other, train={"steps": 1, "seed": 5})
    assert all(pool.run(run_training, 1, tree))
    run_dir = tmp_path / "run"
    sections = merge(base, lora(SOME))
    assert all(pool.run(run_training, 1, small_config(digits, run_dir, **sections)))
    for change, message in (
        ({"checkpoint": {"init_from": str(other)}}, "holds adapters of .* another checkpoint"),
        ({"lora": {"rank": 4}}, "was trained with lora.rank=3, here it is 4"),
        ({"lora": {"targets": ["*.q_proj"]}}, "was trained with other lora.targets"),
        ({"lora": {"targets": []}}, "has adapters and this run none"),
    ):
        changed = small_config(digits, run_dir, **merge(sections, change))
        with pytest.raises(WorkerError, match=message):
            pool.run(run_training, 1, changed)
    next_stage = small_config(digits, tmp_path / "next", checkpoint={"init_from": str(run_dir)})
    with pytest.raises(WorkerError, match="holds adapters alone"):
        pool.run(run_training, 1, next_stage)
    shutil.rmtree(other)


def test_dry_run_counts_adapters(pool, digits, base_of, tmp_path):
    from dattn_mcore.training.dry_run import stage_summary
    from tests.distributed.model_jobs import count_parameters

    sections = merge(lora(SOME, dora=True), {"parallel": {"tp": 2, "pp": 2, "sp": True}})
    tree = small_config(digits, tmp_path, **merge(base_of({}), sections))
    config = from_dict(tree)
    for stage, counted in pool.run(count_parameters, 4, tree):
        total, trained, _ = stage_summary(config, stage)
        assert (total, trained) == counted and trained > 0


@pytest.fixture(scope="module")
def exported(pool, digits, base_of, tmp_path_factory):
    """A base, what adapters and a projector have learnt beside it as peft's folder, and merged."""
    folder, base = tmp_path_factory.mktemp("exported"), base_of({})
    sections = merge(lora(), {"train": {"trains": ["projector", "llm"]}})
    run = small_config(digits, folder / "run", **merge(base, sections))
    assert all(pool.run(run_training, 1, run))
    write_peft(folder / "run", folder / "peft")
    mcore_to_hf.convert(folder / "run", folder / "hf")
    hf_to_mcore.convert(folder / "hf", folder / "merged")
    return base, sections, folder


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [(1, {}), (2, {"tp": 2, "sp": True}), (2, {"pp": 2}), (2, {}), (4, FOUR)],
    ids=["one", "tp2-sp", "pp2", "dp2", "tp2-pp2"],
)
def test_a_run_starts_from_exported_adapters(pool, digits, exported, tmp_path, ranks, parallel):
    """Its first loss is that of the merged weights, its base the one that the folder names."""
    base, sections, folder = exported
    start = merge(base, {"lora": {"init_from": str(folder / "peft")}, "parallel": parallel})
    one = {"train": {"steps": 1}}
    tree = small_config(digits, tmp_path / "run", **merge(merge(sections, start), one))
    assert all(pool.run(run_training, ranks, tree))
    merged = {"checkpoint": {"init_from": str(folder / "merged")}, "optim": sections["optim"]}
    whole = small_config(digits, tmp_path / "whole", **merge(merged, one))
    assert all(pool.run(run_training, 1, whole))
    (row,), (want,) = read_metrics(tmp_path / "run"), read_metrics(tmp_path / "whole")
    assert row["loss"] == pytest.approx(want["loss"], abs=1e-5)
    before = read_metrics(folder / "run")[0]["loss"]  # the same samples, before anything was learnt
    assert abs(row["loss"] - before) > 1e-3


def test_their_mean_is_exported(pool, digits, base_of, tmp_path):
    """As a folder of peft, and merged: the tensors of the running mean, not the last ones."""
    sections = merge(lora(), {"train": {"ema_decay": 0.5}})
    run = small_config(digits, tmp_path / "run", **merge(base_of({}), sections))
    assert all(pool.run(run_training, 2, merge(run, {"parallel": {"pp": 2}})))
    adapters, config = adapters_of(from_dict(run)), from_dict(run)
    mean = DistCheckpoint(tmp_path / "run", ema=True)
    folders = {}
    for name, ema in (("last", False), ("mean", True)):
        write_peft(tmp_path / "run", tmp_path / name, ema=ema)
        folders[name] = read_peft_folder(tmp_path / name, config.model, adapters)
        options = mcore_to_hf.ExportOptions(ema=ema)
        mcore_to_hf.convert(tmp_path / "run", tmp_path / f"hf-{name}", options)
    for entry in adapter_table(config.model, adapters):
        for place in entry.steps():
            want = mean.read(entry.key, place)
            assert torch.equal(folders["mean"].value(entry, place), want.float())
            assert not torch.equal(folders["last"].value(entry, place), want.float())
    merged = {name: load_file(tmp_path / f"hf-{name}" / "model.safetensors") for name in folders}
    changed = [key for key, value in merged["last"].items() if (merged["mean"][key] != value).any()]
    assert set(changed) == adapters.targets


def test_checkpoints_of_adapters_are_scored_and_exported(pool, digits, base_of, tmp_path):
    """By processes beside training, which find the base by what the checkpoint says of it."""
    sections = merge(lora(SOME), reported(digits))
    tree = small_config(digits, tmp_path / "run", **merge(base_of({}), sections))
    assert all(pool.run(run_training, 2, merge(tree, {"parallel": {"pp": 2}}), timeout=300))
    (row,) = read_metrics(tmp_path / "run", "scores")
    assert row["step"] == 2 and 0 <= row["questions"] <= 100
    mcore_to_hf.convert(tmp_path / "run", tmp_path / "hf")
    ours, theirs = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "run/exports/step_00000002", tmp_path / "hf")
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
