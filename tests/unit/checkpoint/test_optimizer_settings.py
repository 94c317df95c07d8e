"""A resumed run takes the optimizer settings given now, in every field of every group, or all of
the checkpoint's; what differs is said in one line."""

import dataclasses
import re
from dataclasses import replace

import pytest
import torch

from dattn_mcore.checkpoint.load import choose_checkpoint
from dattn_mcore.config.checks import check_config
from dattn_mcore.config.schema import OptimConfig, OptimGroup
from dattn_mcore.errors import CheckpointError, ConfigError
from dattn_mcore.parallel.groups import single_process
from dattn_mcore.training.resumed_settings import take_settings
from dattn_mcore.training.schedule import build_scheduler
from tests.unit.checkpoint.runs import small_run, vouch

OTHER = OptimConfig(
    lr=1e-4,
    lr_projector=3e-4,
    lr_vision=2e-5,
    min_lr_ratio=0.5,
    warmup_ratio=0.0,
    weight_decay=0.1,
    beta1=0.8,
    beta2=0.5,
    eps=1e-6,
    clip_grad=0.5,
    vision_layer_decay=0.5,
    groups=(
        OptimGroup(("decoder.layers.0",), weight_decay=0.3, beta1=0.6),
        OptimGroup(("*.self_attn.{q,k,v}_proj",), beta2=0.7),
    ),
)
# The same by hand: pattern of a module's names, and rate, weight decay and both betas.
BY_HAND = [
    (r"^vision\.decoder\.layers\.2\..*linear_qkv\.weight", (2e-5, 0.1, 0.8, 0.7)),
    (r"^vision\.decoder\.layers\.2\..*linear_qkv\.bias", (2e-5, 0.0, 0.8, 0.7)),
    (r"^vision\.decoder\.layers\.1\..*linear_qkv\.weight", (1e-5, 0.1, 0.8, 0.7)),
    (r"^vision\.decoder\.layers\.1\..*linear_qkv\.bias", (1e-5, 0.0, 0.8, 0.7)),
    (r"^vision\.decoder\.layers\.0\..*linear_qkv\.weight", (5e-6, 0.1, 0.8, 0.7)),
    (r"^vision\.decoder\.layers\.0\..*linear_qkv\.bias", (5e-6, 0.0, 0.8, 0.7)),
    (r"^vision\.decoder\.(layers\.2|final).*(norm\.weight|bias)$", (2e-5, 0.0, 0.8, 0.5)),
    (r"^vision\.decoder\.layers\.2", (2e-5, 0.1, 0.8, 0.5)),
    (r"^vision\.decoder\.layers\.1.*(norm\.weight|bias)$", (1e-5, 0.0, 0.8, 0.5)),
    (r"^vision\.decoder\.layers\.1", (1e-5, 0.1, 0.8, 0.5)),
    (r"^vision\.decoder\.layers\.0.*(norm\.weight|bias)$", (5e-6, 0.0, 0.8, 0.5)),
    (r"^vision\.decoder\.layers\.0", (5e-6, 0.1, 0.8, 0.5)),
    (r"^vision\..*bias$", (2.5e-6, 0.0, 0.8, 0.5)),
    (r"^vision\.", (2.5e-6, 0.1, 0.8, 0.5)),
    (r"^projector\..*(norm\.weight|bias)$", (3e-4, 0.0, 0.8, 0.5)),
    (r"^projector\.", (3e-4, 0.1, 0.8, 0.5)),
    (r"^decoder\.layers\.0\.self_attention\.linear_k?[qv]\.", (1e-4, 0.3, 0.6, 0.7)),
    (r"^decoder\.layers\.0\..*norm\.weight$", (1e-4, 0.0, 0.6, 0.5)),
    (r"^decoder\.layers\.0\.", (1e-4, 0.3, 0.6, 0.5)),
    (r"self_attention\.linear_k?[qv]\.", (1e-4, 0.1, 0.8, 0.7)),
    (r"norm\.weight$", (1e-4, 0.0, 0.8, 0.5)),
    (r"", (1e-4, 0.1, 0.8, 0.5)),
]


def groups_of(run):
    """All settings of all groups, with the size of their parameters, in an order of their own."""
    groups = [dict(group) for group in run.optimizer.param_groups]
    for group in groups:
        group.pop("step", None)  # a count, which PyTorch's Adam keeps elsewhere
        group["params"] = sum(parameter.numel() for parameter in group["params"])
    return sorted(groups, key=lambda group: str(sorted(group.items(), key=str)))


@pytest.mark.parametrize("removed", [False, True], ids=["added", "removed"])
def test_every_field_of_every_group_is_todays(checkpoints, small_configuration, removed):
    """With learning rates of parts that come or go: the groups are others then."""
    first, second = small_configuration, replace(small_configuration, optim=OTHER)
    if removed:
        first, second = second, first
        with small_run(checkpoints, first) as run:
            for step in (2, 3):
                run.step(step)
            run.saver.save(3)
    with small_run(checkpoints, second) as run:
        build_scheduler(second, run.optimizer, 10).step(2)
        fresh = groups_of(run)
    with small_run(checkpoints, second) as run:
        scheduler = build_scheduler(second, run.optimizer, 10)
        done = run.resume()
        scheduler.step(2)
        assert groups_of(run) == fresh
        parts = [part.optimizer for part in run.optimizer.chained_optimizers]
        counts = {int(state["step"]) for part in parts for state in part.state.values()}
        assert counts == {2}
        run.step(9)
        run.saver.save(done + 1)


@pytest.mark.parametrize("resumed", [False, True], ids=["fresh", "resumed"])
def test_each_parameter_is_updated_by_its_own_settings(tmp_path, small_configuration, resumed):
    """As `torch.optim.AdamW` does by groups written out by hand, on the same random gradients.

    float32; a step moves a weight by up to 3e-4.
    """
    optim = replace(OTHER, clip_grad=0.0, schedule="constant", min_lr_ratio=0.0)
    config = replace(small_configuration, optim=optim)
    with small_run(tmp_path, config) as run:
        build_scheduler(config, run.optimizer, 10)
        plain = {name: weight.requires_grad_() for name, weight in run.weights().items()}
        groups = []
        for name, weight in plain.items():
            lr, decay, *betas = next(hand for pattern, hand in BY_HAND if re.search(pattern, name))
            groups.append(dict(params=[weight], lr=lr, weight_decay=decay, betas=tuple(betas)))
        adam = torch.optim.AdamW(groups, eps=optim.eps)
        for step in (1, 2):
            run.step(step)
        if resumed:
            run.saver.save(2)
    with small_run(tmp_path, config) as run:
        if resumed:
            assert run.resume() == 2
        build_scheduler(config, run.optimizer, 10).step(0)
        for step in (3,) if resumed else (1, 2, 3):
            run.step(step)
        ours = run.weights()
    for step in (1, 2, 3):
        generator = torch.Generator().manual_seed(step)
        for weight in plain.values():
            weight.grad = torch.randn(weight.shape, generator=generator)
        adam.step()
    for name, weight in plain.items():
        assert (ours[name] - weight).abs().max() < 1e-6, name


def test_another_optimizer_is_refused_in_one_line(checkpoints, small_configuration):
    """Groups that do not say how many steps were done."""
    newest = checkpoints / "step_00000002"
    common = torch.load(newest / "common.pt", weights_only=True)
    common["optimizer"]["optimizer"]["param_groups"][0]["step"] = 7.0
    torch.save(common, newest / "common.pt")
    vouch(newest)
    with (
        small_run(checkpoints, small_configuration) as run,
        pytest.raises(CheckpointError, match="counts 2, 7 steps in its groups"),
    ):
        run.resume()


@pytest.fixture
def manifest(saved):
    """Of step 2 of a run with the default settings and 300 steps."""
    with single_process():
        return choose_checkpoint(saved)[1]


def test_what_changed_is_one_line(small_configuration, manifest, caplog):
    caplog.set_level("INFO")
    config, steps = take_settings(small_configuration, manifest, 300, 300)
    assert (config, steps) == (small_configuration, 300) and not caplog.records
    optim = replace(small_configuration.optim, lr=1e-4, beta2=0.5, lr_projector=3e-4)
    changed = replace(small_configuration, optim=optim)
    assert take_settings(changed, manifest, 600, 300) == (changed, 600)
    (record,) = caplog.records
    assert record.getMessage() == (
        "optimizer settings differ from those of step 2 and hold from here: optim.lr 0.002 -> "
        "0.0001, optim.lr_projector None -> 0.0003, optim.beta2 0.95 -> 0.5, steps of the learning "
        "rate's schedule 300 -> 600 (checkpoint.keep_optimizer_settings=true keeps the others)"
    )


def test_the_checkpoints_settings_can_be_kept(small_configuration, manifest, caplog):
    """All of them, and the schedule with them; they stand in the run's configuration then."""
    caplog.set_level("INFO")
    checkpoint = replace(small_configuration.checkpoint, keep_optimizer_settings=True)
    mine = replace(small_configuration, checkpoint=checkpoint, optim=OTHER)
    check_config(mine)
    config, steps = take_settings(mine, manifest, 200, 300)
    assert (config.optim, steps) == (small_configuration.optim, 300)
    assert replace(config, optim=OTHER) == mine
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "optimizer settings of step 2 are kept (checkpoint.keep_optimizer_settings=true), not: "
        "optim.lr 0.002 -> 0.0001, "
    )


def test_a_kept_schedule_that_has_ended_is_refused(small_configuration, manifest):
    """Steps at rate 0 would change nothing."""
    checkpoint = replace(small_configuration.checkpoint, keep_optimizer_settings=True)
    mine = replace(small_configuration, checkpoint=checkpoint)
    with pytest.raises(ConfigError, match=r"ends at step 300 with a learning rate of 0, .* 600"):
        take_settings(mine, manifest, 600, 300)
    manifest["config"]["optim"]["min_lr_ratio"] = 0.1
    config, steps = take_settings(mine, manifest, 600, 300)
    assert (config.optim.min_lr_ratio, steps) == (0.1, 300)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"decay_steps": 200}, 500),  # both begin to fall at step 301
        ({"wsd_decay": "linear"}, 400),
        ({"min_lr_ratio": 0.5}, 400),
    ],
    ids=["longer", "another curve", "another minimum"],
)
def test_a_decay_that_has_begun_does_not_rise_again(small_configuration, manifest, changes, steps):
    optim = replace(small_configuration.optim, schedule="wsd", decay_steps=100)
    manifest["config"]["optim"] = dataclasses.asdict(optim)
    manifest["step"] = 380
    same = replace(small_configuration, optim=replace(optim, lr=1.0))  # another peak may be
    assert take_settings(same, manifest, 400, 400) == (same, 400)
    mine = replace(small_configuration, optim=replace(optim, **changes))
    with pytest.raises(ConfigError, match="would raise the learning rate again"):
        take_settings(mine, manifest, steps, 400)


def test_a_lower_peak_above_the_same_minimum_is_no_rise(small_configuration, manifest):
    optim = replace(small_configuration.optim, schedule="wsd", decay_steps=100, min_lr=5e-4)
    manifest["config"]["optim"] = dataclasses.asdict(optim)
    manifest["step"] = 380
    mine = replace(small_configuration, optim=replace(optim, lr=optim.lr / 2))
    assert take_settings(mine, manifest, 400, 400) == (mine, 400)
