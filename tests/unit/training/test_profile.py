"""The profile hook, driven as the loop drives it, and what is refused before the first step."""

import contextlib
import gzip
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dattn_mcore.config.checks import check_config
from dattn_mcore.config.load import from_dict
from dattn_mcore.config.schema import ProfileConfig
from dattn_mcore.errors import ConfigError
from dattn_mcore.parallel import platform
from dattn_mcore.training.profile import Profile, profile_hooks


def drive(hook, first, last):
    """Steps, each with one product that has its number as a size."""
    for step in range(first, last + 1):
        hook.before_step(step)
        torch.ones(step, 4) @ torch.ones(4, 4)
        hook.after_step(SimpleNamespace(step=step))
    hook.close(last, complete=True)


def events(path):
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"]


def steps_in(found):
    names = [event.get("name", "") for event in found if event.get("cat") == "user_annotation"]
    return sorted(name for name in names if name.startswith("step "))


def products(found):
    shapes = [e["args"]["Input Dims"] for e in found if e.get("name") == "aten::mm"]
    return sorted(shape[0][0] for shape in shapes)


def test_a_window_of_steps_is_traced_and_no_other(tmp_path):
    hook = Profile(ProfileConfig(start=3, steps=2, ranks=(1,)), tmp_path, rank=1, first_step=0)
    drive(hook, 1, 6)
    (trace,) = (tmp_path / "profile").iterdir()
    assert trace.name == "steps_3-4_rank1.json.gz"
    found = events(trace)
    assert steps_in(found) == ["step 3", "step 4"]
    assert products(found) == [3, 4]
    assert not [event for event in found if event.get("name") == "[memory]"]


def test_allocations_are_in_the_trace_where_they_are_asked_for(tmp_path):
    settings = ProfileConfig(start=1, steps=1, memory=True)
    drive(Profile(settings, tmp_path, rank=0, first_step=0), 1, 1)
    (trace,) = (tmp_path / "profile").iterdir()  # without a GPU there is no snapshot
    assert [event for event in events(trace) if event.get("name") == "[memory]"]


def test_what_is_left_of_a_window_is_traced_after_a_resume(tmp_path):
    hook = Profile(ProfileConfig(start=3, steps=4), tmp_path, rank=0, first_step=4)
    drive(hook, 5, 8)
    (trace,) = (tmp_path / "profile").iterdir()
    assert trace.name == "steps_5-6_rank0.json.gz"
    assert steps_in(events(trace)) == ["step 5", "step 6"]


def test_a_window_that_a_signal_ends_is_written(tmp_path):
    hook = Profile(ProfileConfig(start=2, steps=5), tmp_path, rank=0, first_step=0)
    drive(hook, 1, 3)
    (trace,) = (tmp_path / "profile").iterdir()
    assert trace.name == "steps_2-3_rank0.json.gz"
    assert steps_in(events(trace)) == ["step 2", "step 3"]


def test_nvtx_marks_steps_within_one_capture_and_writes_no_trace(tmp_path, monkeypatch):
    seen = []

    @contextlib.contextmanager
    def noted(name="capture"):
        seen.append(f"begin {name}")
        yield
        seen.append(f"end {name}")

    monkeypatch.setattr(platform, "nvtx_range", noted)
    monkeypatch.setattr(platform, "nvtx_capture", noted)
    drive(Profile(ProfileConfig(start=2, steps=2, nvtx=True), tmp_path, rank=0, first_step=0), 1, 4)
    steps = ["begin step 2", "end step 2", "begin step 3", "end step 3"]
    assert seen == ["begin capture", *steps, "end capture"]
    assert not list((tmp_path / "profile").iterdir())


def hooks_of(config, **run):
    run = {"rank": 0, "world_size": 2, "first_step": 0, "last_step": 10, "device": "cpu"} | run
    return profile_hooks(config, **run)


def test_a_rank_has_the_hook_where_its_turn_is_still_to_come():
    config = from_dict({"profile": {"start": 4, "steps": 2, "ranks": [1]}})
    assert len(hooks_of(config, rank=1)) == 1
    assert not hooks_of(config, rank=0)
    assert len(hooks_of(config, rank=1, first_step=4)) == 1
    assert not hooks_of(config, rank=1, first_step=5)
    assert not hooks_of(replace(config, profile=ProfileConfig()))


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ({"start": 10, "steps": 2}, "ends after step 11, and the run has 10 steps"),
        ({"start": 1, "ranks": [0, 2]}, "there is no rank 2 in a run of 2 processes"),
        ({"start": 1, "nvtx": True}, "profile.nvtx=true needs a GPU"),
    ],
)
def test_what_does_not_fit_the_run_is_one_line(profile, message):
    config = from_dict({"profile": profile, "train": {"steps": None}})
    with pytest.raises(ConfigError, match=message):
        hooks_of(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"profile": {"start": 299, "steps": 3}}, "ends after step 301, and the run has 300 steps"),
        ({"profile": {"start": 0}}, "profile.start=0 must be greater than 0, or null"),
        ({"profile": {"start": 1, "steps": 0}}, "profile.steps=0 must be greater than 0"),
        ({"profile": {"start": 1, "ranks": []}}, r"profile.ranks=\[\] must name one or more"),
        ({"profile": {"start": 1, "ranks": [1, 1]}}, "each once"),
        ({"profile": {"memory": True}}, "profile.memory=true has no effect without profile.start"),
        (
            {"profile": {"start": 1, "nvtx": True}, "train": {"device": "cpu"}},
            "profile.nvtx=true needs a GPU",
        ),
        (
            {"profile": {"start": 9, "steps": 2}, "log": {"communication_share": True}},
            "log.communication_share=true measures step 10 by the profiler",
        ),
    ],
)
def test_what_cannot_be_is_one_line_at_once(settings, message):
    with pytest.raises(ConfigError, match=message):
        check_config(from_dict(settings))


def test_the_share_of_communication_may_be_measured_in_other_steps():
    log = {"communication_share": True}
    check_config(from_dict({"profile": {"start": 11, "steps": 9}, "log": log}))
