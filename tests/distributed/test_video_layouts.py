"""Videos over layouts: loss, norm and every gradient are those of one process.

Videos of different grids, images, a canvas and text stand in one pack; one step has a pack without
any video, whose positions in time must come all the same where gradients are reduced early.
"""

from __future__ import annotations

import functools

import pytest

from dattn_mcore.config.load import merge
from dattn_mcore.types import NO_IMAGES, VisualShape
from tests.distributed.context_gradient_jobs import PackOf, step_gradients
from tests.distributed.small_models import GEMMA, SMALL_MODEL
from tests.distributed.test_context_gradients import together
from tests.distributed.test_gradients_as_declared import LORA


def video(*times: float, side: int) -> VisualShape:
    """A video of frames at these times."""
    return VisualShape(times=times, frame_side=side, duration=times[-1] + 1)


LONG, SHORT = video(0.0, 0.5, 1.5, 4.0, 4.5, side=2), video(0.0, 2.0, side=3)
LAST = video(0.0, 1.0, 2.0, side=4)
PACKS = [
    PackOf(
        (
            ((False, 3), (True, 20), (False, 4), (True, 16), (False, 5)),  # a video and an image
            ((True, 18), (False, 6)),
        ),
        (0, 1),
        ((LONG, (0, 0)), (SHORT,)),
    ),
    PackOf((((True, 48), (False, 5)), ((False, 9),)), (0, NO_IMAGES), (((2, 0 + 1),),)),
    PackOf((((True, 48), (False, 2), (True, 20), (False, 7)),), (0,), ((LAST, LONG),)),
    PackOf((((False, 12),),), (NO_IMAGES,)),
]
SHARED = PackOf(  # two questions about one video
    (((True, 20), (False, 4)), ((False, 2), (True, 20), (False, 5))), (0, 0), ((LONG,),)
)
PACKS[3] = SHARED
VIDEO = {"video": {"enabled": True}}
SECONDS = {"video": {"enabled": True, "time_axis": "seconds"}}
CASES = {
    "tp2-sp": (dict(), {"tp": 2, "sp": True}),
    "pp2": (dict(), {"pp": 2}),
    "dp2, gradients reduced early": (dict(), {"dp": 2, "overlap_grad_reduce": True}),
    "cp2": (dict(), {"cp": 2}),
    "cp4, seconds": (dict(model=SECONDS), {"cp": 4}),
    "cp2-tp2-sp, tiles": (dict(), {"cp": 2, "tp": 2, "sp": True, "tower": "tiles"}),
    "tp2, tiles, early": (dict(), {"tp": 2, "tower": "tiles"}),
    "cp2-dp2, early": (dict(), {"cp": 2, "dp": 2, "overlap_grad_reduce": True}),
    "cp2-pp2, windows, full recompute, chunks": (
        dict(model=GEMMA, train={"recompute": "full", "recompute_visual_chunk": 24}),
        {"cp": 2, "pp": 2},
    ),
    "cp2, adapters, sum": (dict(lora=True, attention={"merge": "sum"}), {"cp": 2}),
}


def tree_of(model=None, attention=None, train=None, lora=False):
    tree = {
        "model": merge(merge(SMALL_MODEL, VIDEO), model or {}),
        "attention": attention or {},
        "train": train or {},
    }
    return merge(tree, LORA) if lora else tree


@pytest.fixture(scope="module")
def alone(pool):
    """Of one process, by what changes the result."""

    @functools.cache
    def run(case):
        settings = {**CASES[case][0]}
        settings.pop("train", None)
        (found,) = pool.run(step_gradients, 1, tree_of(**settings), PACKS, True)
        return found

    return run


@pytest.mark.parametrize("case", CASES)
def test_every_gradient_is_that_of_one_process(pool, alone, case):
    settings, parallel = CASES[case]
    layout = {key: value for key, value in parallel.items() if key != "dp"}
    ranks = parallel.get("dp", 1)
    for axis in ("tp", "pp", "cp"):
        ranks *= parallel.get(axis, 1)
    expected = alone(case)
    tree = {**tree_of(**settings), "parallel": layout}
    results = pool.run(step_gradients, ranks, tree, PACKS, True)
    for one in results:
        assert one.loss == pytest.approx(expected.loss, rel=1e-5)
        assert one.norm == pytest.approx(expected.norm, rel=1e-5)
    found, wanted = together(results), together([expected])
    assert found.keys() == wanted.keys()
    if not settings.get("lora"):
        assert {key for key in wanted if "time_position" in key}
    for key, like in wanted.items():
        largest, distance = like.abs().max(), (found[key] - like).abs().max()
        assert largest > 0, key
        assert distance <= 1e-5 * largest, key
