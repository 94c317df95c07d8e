"""Rules for profiling; one line per breach. What depends on the run is checked when it starts."""

from __future__ import annotations

from collections.abc import Iterator

from dattn_mcore.config.schema import Config, ProfileConfig


def window(config: Config) -> Iterator[str]:
    """Steps that the run has, and that no other measurement needs."""
    profile = config.profile
    if profile.start is None:
        for name in ("steps", "ranks", "memory", "nvtx"):
            if (value := getattr(profile, name)) != getattr(ProfileConfig(), name):
                yield (
                    f"profile.{name}={_text(value)} has no effect without profile.start; give the "
                    "first step to profile"
                )
        return
    if config.train.steps is not None and (problem := beyond(config, config.train.steps)):
        yield problem
    first, last = profile.start, profile.start + profile.steps - 1
    interval = config.log.interval
    measured = config.log.communication_share and 0 in profile.ranks
    if measured and first <= last // interval * interval:
        yield (
            f"log.communication_share=true measures step {last // interval * interval} by the "
            "profiler that profile.start needs; leave one of them out, or move profile.start"
        )


def what_is_recorded(config: Config) -> Iterator[str]:
    """Ranks that can exist, and NVTX on a GPU."""
    ranks = config.profile.ranks
    if not ranks or min(ranks) < 0 or len(set(ranks)) < len(ranks):
        yield (
            f"profile.ranks={list(ranks)} must name one or more ranks, from 0, each once; for "
            "example profile.ranks=[0]"
        )
    if config.profile.nvtx and config.train.device == "cpu":
        yield NVTX_NEEDS_GPU


NVTX_NEEDS_GPU = "profile.nvtx=true needs a GPU; leave it out on a CPU"


def beyond(config: Config, steps: int) -> str | None:
    """What is wrong with a window in a run of so many steps."""
    profile = config.profile
    if profile.start is None or profile.start + profile.steps - 1 <= steps:
        return None
    return (
        f"profile.start={profile.start} with profile.steps={profile.steps} ends after step "
        f"{profile.start + profile.steps - 1}, and the run has {steps} steps; choose an earlier "
        "or a shorter window"
    )


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value) if isinstance(value, tuple) else value)
