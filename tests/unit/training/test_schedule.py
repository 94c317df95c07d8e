"""The learning rate of every step: no step of rate 0, the peak where it is asked for."""

import math
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from dattn_mcore.config.checks import check_config
from dattn_mcore.config.load import from_dict, load_config
from dattn_mcore.config.schema import Config, OptimConfig, TrainConfig
from dattn_mcore.errors import ConfigError
from dattn_mcore.training.interval import learning_rates
from dattn_mcore.training.schedule import build_scheduler, rate_of

PEAK = 2e-3


def rates(steps, warmup_ratio, min_lr_ratio=0.0, first=0, peak=PEAK):
    """The rate of each step from `first` on, and the rate after the last step."""
    config = load_config(
        None,
        [
            f"optim.lr={PEAK}",
            f"optim.warmup_ratio={warmup_ratio}",
            f"optim.min_lr_ratio={min_lr_ratio}",
        ],
    )
    group = {"max_lr": peak, "min_lr": peak * min_lr_ratio}
    optimizer = SimpleNamespace(param_groups=[group])
    scheduler = build_scheduler(config, optimizer, steps)
    assert type(scheduler) is OptimizerParamScheduler
    scheduler.step(first)
    used = []
    for _ in range(first, steps):
        used.append(group["lr"])
        scheduler.step(1)
    return used, group["lr"]


def test_the_first_the_peak_and_the_last_rate():
    """10 steps, 3 of them warm up: i / 3 of the peak, then a cosine whose end is step 11."""
    used, after = rates(10, 0.3)
    assert used[:3] == pytest.approx([PEAK / 3, PEAK * 2 / 3, PEAK], rel=1e-12)
    assert used[3] == pytest.approx(PEAK * (1 + math.cos(math.pi / 8)) / 2, rel=1e-12)
    assert used[9] == pytest.approx(PEAK * (1 + math.cos(math.pi * 7 / 8)) / 2, rel=1e-12)
    assert used[9] > 0 and after == 0


def test_without_a_warm_up_the_first_step_has_the_peak():
    used, after = rates(4, 0.0, min_lr_ratio=0.1)
    low = PEAK * 0.1
    expected = [low + (PEAK - low) * (1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]
    assert used == pytest.approx(expected, rel=1e-12)
    assert used[0] == PEAK and after == pytest.approx(low, rel=1e-12)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.05, 0.5, 1.0])
def test_the_shortest_runs_learn_in_every_step(steps, warmup_ratio):
    used, after = rates(steps, warmup_ratio)
    assert max(used) == PEAK and min(used) > 0
    assert after == 0


@settings(deadline=None)
@given(
    steps=st.integers(1, 400),
    warmup_ratio=st.floats(0, 1),
    min_lr_ratio=st.sampled_from([0.0, 0.1, 1.0]),
    peak=st.sampled_from([PEAK, 1e-5]),
    data=st.data(),
)
def test_no_step_has_rate_zero_wherever_the_run_goes_on(
    steps, warmup_ratio, min_lr_ratio, peak, data
):
    used, after = rates(steps, warmup_ratio, min_lr_ratio, peak=peak)
    top = max(round(warmup_ratio * steps), 1) - 1
    assert used[top] == pytest.approx(peak, rel=1e-12)
    assert max(used) == pytest.approx(peak, rel=1e-12)
    assert all(a < b for a, b in zip(used[:top], used[1 : top + 1], strict=True))
    # Where the minimum is the peak, the rates after it differ from it in the last bit only.
    falls = [a * (1 + 1e-12) >= b for a, b in zip(used[top:], used[top + 1 :], strict=False)]
    assert all(falls)
    assert min(used) > 0 and after == pytest.approx(peak * min_lr_ratio, rel=1e-12)
    first = data.draw(st.integers(0, steps))
    assert rates(steps, warmup_ratio, min_lr_ratio, first, peak) == (used[first:], after)


def curve(steps, **settings):
    """Rate of each step and the one after the last, of a peak of 1."""
    optim = OptimConfig(lr=1.0, **settings)
    check_config(Config(optim=optim, train=TrainConfig(steps=steps)))
    return [rate_of(optim, steps, step) for step in range(1, steps + 2)]


def test_every_schedule_has_its_curve():
    """Warm-up over 2 of 6 steps; the minimum where step 7 would be."""
    common = {"warmup_steps": 2, "min_lr_ratio": 0.2}
    assert curve(6, **common, schedule="linear") == pytest.approx(
        [0.5, 1.0, 0.84, 0.68, 0.52, 0.36, 0.2]
    )
    assert curve(6, **common)[3] == pytest.approx(0.2 + 0.8 * (1 + math.cos(0.4 * math.pi)) / 2)
    assert curve(6, warmup_steps=2, schedule="constant") == [0.5] + [1.0] * 6
    roots = [0.5] + [(2 / step) ** 0.5 for step in range(2, 8)]
    assert curve(6, warmup_steps=2, schedule="inverse_square_root") == pytest.approx(roots)
    floored = curve(60, **common, schedule="inverse_square_root")
    assert floored[:6] == pytest.approx(roots[:6]) and floored[59] == 0.2


@pytest.mark.parametrize(
    ("decay", "shares"),
    [
        ("linear", [2 / 3, 1 / 3, 0.0]),
        ("cosine", [0.75, 0.25, 0.0]),
        ("exponential", [2 * 0.5 ** (1 / 3) - 1, 2 * 0.5 ** (2 / 3) - 1, 0.0]),
        ("minus_sqrt", [1 - (1 / 3) ** 0.5, 1 - (2 / 3) ** 0.5, 0.0]),
    ],
)
def test_wsd_decays_at_the_end(decay, shares):
    settings = {"warmup_steps": 2, "schedule": "wsd", "wsd_decay": decay, "min_lr_ratio": 0.1}
    stable = curve(6, **settings)
    assert stable == [0.5, *[1.0] * 6]
    rates = curve(6, **settings, decay_steps=2)
    expected = [0.5, 1.0, 1.0, 1.0, *(0.1 + 0.9 * share for share in shares)]
    assert rates == pytest.approx(expected)
    longer = curve(9, **settings, decay_steps=2)
    assert longer[:4] == rates[:4] and longer[-3:] == pytest.approx(rates[-3:])


def test_steps_do_not_depend_on_the_length_of_the_run():
    for chosen in (
        {"schedule": "cosine", "warmup_steps": 3, "decay_steps": 40},
        {"schedule": "linear", "warmup_steps": 0, "decay_steps": 40},
        {"schedule": "linear", "warmup_ratio": 0.1, "decay_steps": 40},
        {"schedule": "constant", "warmup_steps": 3},
        {"schedule": "inverse_square_root", "warmup_steps": 3},
        {"schedule": "wsd", "warmup_steps": 3},
    ):
        assert curve(30, **chosen) == curve(10, **chosen)[:11] + curve(30, **chosen)[11:]
        assert min(curve(30, **chosen)) > 0
    past = curve(8, warmup_steps=1, decay_steps=4, min_lr=0.25)
    assert past[4:] == pytest.approx([0.25] * 5)


def test_a_minimum_is_given_as_a_rate_or_relative_to_the_peak():
    assert curve(5, min_lr=0.25) == curve(5, min_lr_ratio=0.25)


def test_the_default_is_the_cosine_with_a_warm_up_of_a_twentieth():
    assert curve(40) == curve(40, schedule="cosine", warmup_ratio=0.05)
    assert curve(40)[:3] == [0.5, 1.0, pytest.approx(0.9984, abs=1e-4)]


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        (
            {"warmup_steps": 5, "warmup_ratio": 0.1},
            "optim.warmup_steps=5 and optim.warmup_ratio=0.1 both say how long the warm-up is; set",
        ),
        (
            {"min_lr": 1e-5, "min_lr_ratio": 0.1},
            "optim.min_lr=1e-05 and optim.min_lr_ratio=0.1 both say what the least learning rate",
        ),
        ({"min_lr": 1.0}, r"optim.min_lr=1.0 must be at most optim.lr=0.002"),
        ({"min_lr": 0.0}, r"optim.min_lr=0.0 must be greater than 0, or null for optim.min_lr_ra"),
        ({"warmup_steps": -1}, r"optim.warmup_steps=-1 must be at least 0 \(0: none\)"),
        ({"decay_steps": -1}, r"optim.decay_steps=-1 must be at least 0"),
        ({"warmup_steps": 301}, r"optim.warmup_steps=301 is more than the run's steps \(300\)"),
        (
            {"warmup_steps": 30, "decay_steps": 20, "min_lr": 1e-5},
            r"optim.warmup_steps=30 is more than optim.decay_steps \(20\); set a smaller one",
        ),
        (
            {"decay_steps": 200},
            "optim.decay_steps=200 ends with a learning rate of 0 before the run's 300 steps do",
        ),
        (
            {"decay_steps": 20, "schedule": "constant"},
            "optim.decay_steps=20 has no effect with optim.schedule=constant, which has no end",
        ),
        (
            {"decay_steps": 20, "schedule": "inverse_square_root"},
            "optim.decay_steps=20 has no effect with optim.schedule=inverse_square_root",
        ),
        ({"decay_steps": 0}, "optim.decay_steps=0 means no decay with optim.schedule=wsd only"),
        (
            {"schedule": "constant", "min_lr_ratio": 0.1},
            "optim.schedule=constant has no least learning rate",
        ),
        ({"wsd_decay": "linear"}, "optim.wsd_decay=linear has no effect with optim.schedule=cosi"),
        (
            {"schedule": "wsd", "decay_steps": 290},
            "optim.decay_steps=290 after a warm-up of 15 steps needs a longer run than 300 steps",
        ),
        ({"schedule": "cosin"}, "optim.schedule='cosin' is unknown; .*did you mean cosine"),
        ({"schedule": "wsd", "wsd_decay": "sqrt"}, "optim.wsd_decay='sqrt' is unknown; use one of"),
    ],
)
def test_schedules_that_mean_nothing(optim, message):
    with pytest.raises(ConfigError, match=message):
        check_config(from_dict({"optim": optim}))


def test_a_run_of_epochs_is_checked_when_its_steps_are_known():
    config = from_dict({"optim": {"decay_steps": 200}, "train": {"steps": None}})
    check_config(config)
    with pytest.raises(ConfigError, match="ends with a learning rate of 0 before the run's 300"):
        build_scheduler(config, SimpleNamespace(param_groups=[{}]), 300)


def test_the_report_names_the_rates_of_parts():
    config = load_config(None, ["optim.lr=1.0", "optim.lr_projector=3.0", "optim.lr_vision=1.0"])
    assert learning_rates(config, {1.0: 0.1, 3.0: 0.3}) == {"lr": 0.1, "lr_projector": 0.3}
    # The projector alone learns, at a rate of its own.
    assert learning_rates(config, {3.0: 0.3}) == {"lr": 0.3, "lr_projector": 0.3}


def test_the_report_names_the_rates_of_groups():
    groups = [{"patterns": "llm", "lr": 5.0}, {"patterns": "vision", "weight_decay": 0.1}]
    config = from_dict({"optim": {"lr": 1.0, "groups": groups}})
    assert learning_rates(config, {1.0: 0.1, 5.0: 0.5}) == {"lr": 0.1, "lr_group_0": 0.5}
