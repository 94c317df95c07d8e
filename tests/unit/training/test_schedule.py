"""The learning rate of every step: no step of rate 0, the peak where it is asked for."""

import math
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from dattn_mcore.config.load import load_config
from dattn_mcore.training.interval import learning_rates
from dattn_mcore.training.optimizer import build_scheduler

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


def test_the_report_names_the_rates_of_parts():
    config = load_config(None, ["optim.lr=1.0", "optim.lr_projector=3.0", "optim.lr_vision=1.0"])
    assert learning_rates(config, {1.0: 0.1, 3.0: 0.3}) == {"lr": 0.1, "lr_projector": 0.3}
    # The projector alone learns, at a rate of its own.
    assert learning_rates(config, {3.0: 0.3}) == {"lr": 0.3, "lr_projector": 0.3}
