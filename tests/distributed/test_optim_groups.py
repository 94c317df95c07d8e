"""Groups of parameters: the same weights in every layout as plain AdamW has by groups by hand.

One configuration holds what can go wrong: a tower frozen below a trained layer and with rates that
decay over its layers, a part's own rate, patterns over exported names of fused tensors with their
own rate, weight decay and betas, and layers that are frozen between others that learn.
"""

import json

import pytest
import torch

from dattn_mcore.config.load import merge
from tests.distributed.interrupted_jobs import train_until_killed
from tests.distributed.jobs import read_metrics, run_training, run_training_with_log
from tests.distributed.optim_jobs import weights_by_plain_adamw
from tests.distributed.pool import WorkerError
from tests.distributed.small_models import small_config
from tests.distributed.watched_jobs import weights_by_step
from tools.checkpoint_convert.dist_checkpoint import DistCheckpoint

GROUPS = [
    {"patterns": "vision.layers.{1..2}", "trains": True},
    {
        "patterns": "model.language_model.layers.{1,3}.self_attn.{k,v}_proj",
        "lr": 6e-3,
        "weight_decay": 0.5,
        "beta1": 0.5,
        "beta2": 0.7,
    },
    {"patterns": ["decoder.layers.1.mlp", "*.layers.2"], "weight_decay": 0.0},
    {"patterns": "llm.layers.2.mlp", "trains": False},
]
SECTIONS = {
    "model": {"vision": {"num_layers": 3}},
    "optim": {
        "lr": 3e-3,
        "eps": 1e-5,  # see test_features_by_layout
        "weight_decay": 0.2,
        "vision_layer_decay": 0.5,
        "lr_projector": 1e-3,
        "groups": GROUPS,
        "schedule": "linear",
        "warmup_steps": 2,
        "warmup_ratio": None,
        "decay_steps": 5,
    },
    "train": {"trains": ["projector", "llm"], "steps": 3},
}
RATES = [0.5, 1.0, 0.75]  # of 5 steps; the sixth would have none
BETAS = (0.9, 0.95)
NORM = r"(\.bias|norm\.weight)$"
LAYERS = r"^vision\.decoder\.layers"
BY_HAND = [
    (rf"{LAYERS}\.1\..*{NORM}", (1.5e-3, 0.0, *BETAS)),
    (rf"{LAYERS}\.1\.", (1.5e-3, 0.2, *BETAS)),
    # The tower's last layer has its whole rate.
    (rf"{LAYERS}\.2\..*{NORM}", (3e-3, 0.0, *BETAS)),
    (rf"{LAYERS}\.2\.", (3e-3, 0.0, *BETAS)),  # "*.layers.2" means the tower's, too
    (r"^vision\.", None),
    (rf"^projector\..*{NORM}", (1e-3, 0.0, *BETAS)),
    (r"^projector\.", (1e-3, 0.2, *BETAS)),
    (r"^decoder\.layers\.2\.mlp\.", None),
    (r"^decoder\.layers\.[13]\.self_attention\.linear_kv", (6e-3, 0.5, 0.5, 0.7)),
    (r"^decoder\.layers\.(1\.mlp|2\.)", (3e-3, 0.0, *BETAS)),
    (NORM, (3e-3, 0.0, *BETAS)),
    (r"", (3e-3, 0.2, *BETAS)),
]
LAYOUTS = {
    "tp2-sp": (2, {"tp": 2, "sp": True}),
    "pp2": (2, {"pp": 2}),
    "dp2": (2, {}),
    "tp2-pp2": (4, {"tp": 2, "pp": 2}),
}


def tree_for(digits, run_dir, **sections):
    return small_config(digits, run_dir, **merge(SECTIONS, sections))


def saved_weights(run_dir):
    """Every tensor of the newest checkpoint, all layers and shards together."""
    checkpoint = DistCheckpoint(run_dir)
    return {key: checkpoint.read(key) for key in checkpoint.shapes}


def largest_difference(ours, theirs):
    assert ours.keys() == theirs.keys()
    return max(float((ours[key] - theirs[key]).abs().max()) for key in ours)


@pytest.fixture(scope="module")
def one_process(pool, digits, tmp_path_factory):
    """Metrics and last weights of three steps in one process."""
    run_dir = tmp_path_factory.mktemp("one")
    (weights,) = pool.run(weights_by_step, 1, tree_for(digits, run_dir))
    return run_dir, weights


def test_as_plain_adamw_with_groups_by_hand(pool, digits, tmp_path, one_process):
    """After one step and after three; frozen tensors to the bit. Both round differently."""
    run_dir, ours = one_process
    tree = tree_for(digits, tmp_path)
    (plain,) = pool.run(weights_by_plain_adamw, 1, tree, BY_HAND, RATES)
    assert len(ours) == len(plain) == 4
    assert largest_difference(ours[1], plain[1]) < 1e-6
    assert largest_difference(ours[3], plain[3]) < 1e-5  # a step moves a weight by up to 6e-3
    moved = {name for name in ours[0] if not ours[0][name].equal(ours[3][name])}
    assert moved == {name for name in plain[0] if not plain[0][name].equal(plain[3][name])}
    assert 0 < len(moved) < len(ours[0])
    rates = [(row["lr"], row["lr_projector"], row["lr_group_1"]) for row in read_metrics(run_dir)]
    assert rates == [pytest.approx((3e-3 * share, 1e-3 * share, 6e-3 * share)) for share in RATES]


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_same_weights_in_every_layout(pool, digits, tmp_path, one_process, name):
    """The sums are added in another order, and Adam divides by their size."""
    world_size, parallel = LAYOUTS[name]
    run_dir, _ = one_process
    assert all(pool.run(run_training, world_size, tree_for(digits, tmp_path, parallel=parallel)))
    for row, want in zip(read_metrics(tmp_path), read_metrics(run_dir), strict=True):
        assert row["loss"] == pytest.approx(want["loss"], abs=1e-5)
        assert row["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)
        assert {key for key in row if key.startswith("lr")} == {
            key for key in want if key.startswith("lr")
        }
    ours, theirs = saved_weights(tmp_path), saved_weights(run_dir)
    frozen = ours["decoder.layers.mlp.linear_fc1.weight"][2]
    assert frozen.equal(theirs["decoder.layers.mlp.linear_fc1.weight"][2])
    assert largest_difference(ours, theirs) < 1e-4


def test_recompute_does_not_lose_gradients_above_frozen_layers(pool, digits, tmp_path):
    """Megatron-Core's checkpoint gives weights no gradient where its input has none."""
    groups = [{"patterns": "decoder.layers.{0,3}", "trains": True}]
    sections = {"optim": {"groups": groups, "vision_layer_decay": None}, "train": {"trains": []}}
    norms = {}
    for name, train in {
        "kept": {},
        "full": {"recompute": "full"},
        "chunks": {"recompute_visual_chunk": 24},
        "mlp": {"recompute": "selective", "recompute_modules": ["mlp", "core_attn"]},
    }.items():
        run_dir = tmp_path / name
        pool.run(run_training, 1, tree_for(digits, run_dir, **merge(sections, {"train": train})))
        norms[name] = [row["grad_norm"] for row in read_metrics(run_dir)]
    assert min(norms["kept"]) > 1e-2
    for name in ("full", "chunks", "mlp"):
        assert norms[name] == pytest.approx(norms["kept"], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "then"), [("one", "one"), ("tp2-pp2", "tp2-pp2"), ("tp2-pp2", "one")]
)
def test_groups_survive_a_resume(pool, digits, tmp_path, one_process, name, then):
    """Every group keeps its own rate, weight decay and betas; bitwise in the same layout."""
    layouts = {"one": (1, {}), **LAYOUTS}
    world_size, parallel = layouts[name]
    tree = tree_for(digits, tmp_path / "parts", parallel=parallel)
    assert pool.run(train_until_killed, world_size, tree, 1) == [False] * world_size
    world_size, parallel = layouts[then]
    tree = tree_for(digits, tmp_path / "parts", parallel=parallel)
    assert all(pool.run(run_training, world_size, tree))
    whole = one_process[0]
    if name == then != "one":
        whole = tmp_path / "whole"
        pool.run(run_training, world_size, tree_for(digits, whole, parallel=parallel))
    difference = largest_difference(saved_weights(tmp_path / "parts"), saved_weights(whole))
    assert difference == 0 if name == then else difference < 1e-4


def test_a_resume_with_other_groups(pool, digits, tmp_path):
    """Other rates hold from there on; other parameters are refused in one line."""
    tree = tree_for(digits, tmp_path)
    pool.run(train_until_killed, 1, tree, 1)
    frozen = [*GROUPS, {"patterns": "decoder.layers.0", "trains": False}]
    with pytest.raises(WorkerError, match=r"trains decoder.layers.*of layer 0 and this run does"):
        pool.run(run_training, 1, merge(tree, {"optim": {"groups": frozen}}))
    rates = [{**GROUPS[0], "lr": 9e-3}, *GROUPS[1:]]
    other = merge(tree, {"optim": {"groups": rates, "vision_layer_decay": None}})
    ((done, log),) = pool.run(run_training_with_log, 1, other)
    assert done and "optim.groups" in log and "hold from here" in log
    assert read_metrics(tmp_path)[1]["lr_group_0"] == pytest.approx(9e-3)


WSD = {"schedule": "wsd", "warmup_steps": 2, "warmup_ratio": None, "decay_steps": None}


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        (1, {}),
        (2, {"tp": 2, "sp": True}),
        (2, {"pp": 2}),
        (2, {}),
        (4, {"tp": 2, "pp": 2, "sp": True}),
    ],
    ids=["one", "tp2-sp", "pp2", "dp2", "tp2-pp2"],
)
def test_a_finished_wsd_run_goes_on_as_one_planned_so(pool, digits, tmp_path, ranks, parallel):
    """Three stable steps, finished, then two more with a decay over two: bit for bit."""
    short, whole = tmp_path / "short", tmp_path / "whole"
    optim = {"optim": {**WSD, "groups": GROUPS[1:2], "vision_layer_decay": None}}
    optim["parallel"] = parallel
    pool.run(run_training, ranks, tree_for(digits, short, **optim))
    assert json.loads((short / "finished.json").read_text()) == {"step": 3}
    longer = merge(optim, {"optim": {"decay_steps": 2}, "train": {"steps": 5}})
    pool.run(run_training, ranks, tree_for(digits, short, **longer))
    pool.run(run_training, ranks, tree_for(digits, whole, **longer))
    for name in ("loss", "lr", "lr_group_0", "grad_norm"):
        here, there = ([row[name] for row in read_metrics(path)] for path in (short, whole))
        assert here == there and len(here) == 5, name
    assert largest_difference(saved_weights(short), saved_weights(whole)) == 0
    rates = [row["lr"] for row in read_metrics(whole)]
    peak = 3e-3
    fall = [2 * 0.5 ** (i / 3) - 1 for i in (1, 2)]
    assert rates == pytest.approx([peak / 2, peak, peak, peak * fall[0], peak * fall[1]])
    # The decay has begun: it cannot be moved.
    again = merge(longer, {"train": {"steps": 7}})
    with pytest.raises(WorkerError, match="step 5 stands in the last decay .* began at step 4"):
        pool.run(run_training, ranks, tree_for(digits, short, **again))


@pytest.mark.parametrize(
    "optim",
    [
        {"schedule": "constant", "warmup_steps": 2, "decay_steps": None},
        {"schedule": "cosine", "warmup_steps": 2, "decay_steps": 6},
    ],
    ids=["constant", "cosine"],
)
def test_a_schedule_in_steps_goes_on_without_a_jump(pool, digits, tmp_path, optim):
    short, whole = tmp_path / "short", tmp_path / "whole"
    sections = {"optim": optim}
    pool.run(run_training, 1, tree_for(digits, short, **sections))
    longer = merge(sections, {"train": {"steps": 5}})
    pool.run(run_training, 1, tree_for(digits, short, **longer))
    pool.run(run_training, 1, tree_for(digits, whole, **longer))
    for name in ("loss", "lr"):
        here, there = ([row[name] for row in read_metrics(path)] for path in (short, whole))
        assert here == there and len(here) == 5, name
    assert torch.isfinite(torch.tensor(here)).all()
