"""Times that are looked at, and rows within a budget: against plain counts of frames."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from dattn_mcore.data.media.video.probe import VideoHeader
from dattn_mcore.data.media.video.rows import plan_rows, rows_of_frame
from dattn_mcore.data.media.video.sampling import times_of
from dattn_mcore.data.media.video.settings import VideoSampling


def header(duration: float, rate: float = 30.0, frames: int = 0, keyframes=()) -> VideoHeader:
    return VideoHeader(64, 48, duration, rate, frames, "vp9", keyframes)


def test_a_rate_gives_a_time_each_second() -> None:
    assert times_of(header(4.0), VideoSampling(fps=1)) == (0, 1, 2, 3)
    assert times_of(header(4.2), VideoSampling(fps=1)) == (0, 1, 2, 3, 4)
    assert times_of(header(1.0), VideoSampling(fps=2)) == (0, 0.5)
    assert times_of(header(0.1), VideoSampling(fps=1)) == (0,)
    assert len(times_of(header(3600.0), VideoSampling(fps=2, max_frames=7200))) == 7200


def test_more_than_the_most_are_spread_from_the_first_to_the_last() -> None:
    times = times_of(header(100.0, rate=10.0), VideoSampling(fps=1, max_frames=12))
    assert len(times) == 12 and times[0] == 0
    assert times[-1] == pytest.approx(99.9)
    assert {round(b - a, 6) for a, b in itertools.pairwise(times)} == {round(99.9 / 11, 6)}


def test_a_count_has_the_first_and_the_last_frame() -> None:
    times = times_of(header(10.0, rate=10.0), VideoSampling(policy="count", count=5))
    assert times == pytest.approx((0, 2.475, 4.95, 7.425, 9.9))
    assert times_of(header(10.0), VideoSampling(policy="count", count=1)) == (0,)
    # A video of three frames is not asked for more.
    assert len(times_of(header(0.3, rate=10.0), VideoSampling(policy="count", count=8))) == 3


@pytest.mark.parametrize(
    ("rate", "frames", "expected"),
    [
        (30.0, 300, range(0, 300, 30)),
        (29.97, 300, range(0, 300, 30)),  # one each 1.001 s
        (24.0, 100, range(0, 100, 24)),
        (0.4, 5, range(5)),  # slower than what is wanted: every frame
    ],
)
def test_a_stride_takes_every_nth_frame(rate: float, frames: int, expected: range) -> None:
    """round(rate / fps), as Vidi's loader does; where that is 0, which it refuses, 1."""
    found = times_of(header(frames / rate, rate, frames), VideoSampling(policy="vidi"))
    assert [round(time * rate) for time in found] == list(expected)


def test_keyframes_are_thinned_evenly() -> None:
    keys = tuple(float(n) for n in range(10))
    sampling = VideoSampling(policy="keyframes", max_frames=4)
    assert times_of(header(10.0, keyframes=keys), sampling) == (0, 3, 6, 9)
    assert times_of(header(10.0, keyframes=keys[:3]), sampling) == (0, 1, 2)


def test_times_rise_and_lie_in_the_video() -> None:
    draw = random.Random(0)
    for _ in range(300):
        rate = draw.choice([0.3, 1.0, 12.5, 23.976, 60.0])
        duration = draw.uniform(0.01, 400.0)
        sampling = VideoSampling(
            policy=draw.choice(["fps", "count", "vidi"]),
            fps=draw.choice([0.2, 1.0, 2.0, 7.0]),
            count=draw.randint(1, 64),
            max_frames=draw.randint(1, 100),
        )
        times = times_of(header(duration, rate), sampling)
        assert times[0] == 0 and all(b > a for a, b in itertools.pairwise(times))
        assert times[-1] < duration or len(times) == 1
        assert len(times) <= (sampling.count if sampling.policy == "count" else sampling.max_frames)


def plain_rows(side: int, block: int) -> int:
    """Blocks of a grid with zero cells below and to the right where it does not divide."""
    return len([1 for _ in range(0, side, block) for _ in range(0, side, block)])


def test_rows_are_those_of_the_plan_for_40_drawn_settings() -> None:
    draw = random.Random(1)
    for _ in range(40):
        block, side = draw.choice([1, 2]), draw.randint(4, 28)
        frames, budget = draw.randint(1, 400), draw.randint(200, 40_000)
        times = tuple(float(n) for n in range(frames))
        for reduce in ("frames", "resolution"):
            kept, found = plan_rows(times, side=side, block=block, max_rows=budget, reduce=reduce)
            per_frame = plain_rows(found, block)
            assert rows_of_frame(found, block) == per_frame
            assert len(kept) * per_frame <= budget
            assert kept[0] == 0 and set(kept) <= set(times) and len(set(kept)) == len(kept)
            if len(kept) < frames:  # no more frames would fit
                assert (len(kept) + 1) * per_frame > budget
            if frames * plain_rows(side, block) <= budget:
                assert (kept, found) == (times, side)
            elif reduce == "frames" and per_frame == plain_rows(side, block):
                assert found == side
            elif found < side and len(kept) == frames:  # the next larger grid would not fit
                larger = min(found + block, side)
                assert frames * plain_rows(larger, block) > budget or larger == side


def test_frames_that_are_kept_are_spread_over_the_video() -> None:
    times = tuple(float(n) for n in range(101))
    kept, side = plan_rows(times, side=10, block=1, max_rows=1100, reduce="frames")
    assert side == 10 and kept == tuple(float(n) for n in range(0, 101, 10))


def test_resolution_falls_by_the_square_root() -> None:
    times = tuple(float(n) for n in range(400))
    kept, side = plan_rows(times, side=28, block=2, max_rows=60_000, reduce="resolution")
    assert kept == times and side == 2 * math.isqrt(60_000 // 400) == 24


def test_a_budget_below_one_frame_is_refused() -> None:
    with pytest.raises(ValueError, match="a frame has 16 visual rows at least"):
        plan_rows((0.0, 1.0), side=12, block=1, max_rows=15, reduce="resolution")
