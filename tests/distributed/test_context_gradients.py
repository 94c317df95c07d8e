"""Each gradient, tensor by tensor, of a step whose rows context parallel ranks divide.

It is that of one process which keeps a copy of its images for every sample and all rows to the end.
The packs of the step hold AnyRes canvases, images between text, samples that share images, samples
of text alone, a pack whose only tile lies on one rank, and one without any visual row.
"""

import functools

import pytest
import torch

from dattn_mcore.config.load import merge
from dattn_mcore.types import NO_IMAGES
from tests.distributed.context_gradient_jobs import PackOf, step_gradients
from tests.distributed.gradient_jobs import spans
from tests.distributed.small_models import (
    GEMMA,
    GEMMA3,
    LLAMA,
    MINISTRAL3,
    QWEN3,
    SMALL_MODEL,
    SMOLLM3,
)
from tests.distributed.test_gradients_as_declared import LORA
from tests.distributed.test_shared_images import CANVAS_GRIDS, PLAIN, UNITS, layouts_of

PACKS = [
    PackOf(layouts_of(CANVAS_GRIDS), UNITS, CANVAS_GRIDS),
    PackOf((((True, 16), (False, 5)), ((False, 19),)), (0, NO_IMAGES), (((0, 0),),)),
    PackOf((((False, 7),), ((False, 12),)), (NO_IMAGES, NO_IMAGES)),
    PackOf((((False, 3), (True, 16), (False, 6)),), (0,), (((0, 0),),)),
]
CP2, CP4 = {"cp": 2}, {"cp": 4}
TENSOR = {"cp": 2, "tp": 2, "sp": True}
PIPELINE = {"cp": 2, "pp": 2}
ALL_BUT_DATA = {"cp": 2, "tp": 2, "pp": 2, "sp": True}
ROPE, SUM = {"t2v_position": "rope"}, {"merge": "sum"}
FULL = {"recompute": "full"}
CHUNKS = {"recompute_visual_chunk": 24}


def tree_of(model=None, attention=None, train=None, lora=False):
    tree = {
        "model": merge(SMALL_MODEL, model or {}),
        "attention": attention or {},
        "train": train or {},
    }
    return merge(tree, LORA) if lora else tree


# Settings and layout.
CASES = {
    "cp2": (dict(), CP2),
    "cp4": (dict(), CP4),
    "cp2-tp2-sp": (dict(), TENSOR),
    "cp2-pp2": (dict(), PIPELINE),
    "cp2-dp2": (dict(), {**CP2, "dp": 2}),
    "cp2-tp2-pp2-sp": (dict(), ALL_BUT_DATA),
    "cp2-tp2, without sp": (dict(attention=SUM), {"cp": 2, "tp": 2}),
    "cp2, soft-caps and windows": (dict(model=GEMMA), CP2),
    "cp2-pp2, tied, windows, full recompute": (dict(model=GEMMA, train=FULL), PIPELINE),
    "cp4, one axis": (dict(attention=ROPE), CP4),
    "cp2-tp2-sp, one axis, sum, chunks": (
        dict(attention={**ROPE, **SUM}, train=CHUNKS),
        TENSOR,
    ),
    "cp2-pp2, sum, chunks": (dict(attention=SUM, train=CHUNKS), PIPELINE),
    "cp2, full recompute of chunks": (dict(train={**CHUNKS, **FULL}), CP2),
    "cp4, sum, selective": (
        dict(
            attention=SUM,
            train={"recompute": "selective", "recompute_modules": ["core_attn", "mlp"]},
        ),
        CP4,
    ),
    "cp2, linear rope, two kinds": (dict(model=GEMMA3), CP2),
    "cp2-tp2-sp, rope by wave length": (dict(model=LLAMA), TENSOR),
    "cp4, yarn": (dict(model=MINISTRAL3), CP4),
    "cp2-pp2, a layer without rope": (dict(model=SMOLLM3), PIPELINE),
    "cp2-tp2-sp, norms of heads": (dict(model=QWEN3), TENSOR),
    "cp2, gradients reduced early": (dict(), {**CP2, "overlap_grad_reduce": True}),
    "cp4, frozen tower": (dict(train={"trains": ["projector", "llm"]}), CP4),
    "cp2-pp2, projector alone": (dict(train={"trains": ["projector"]}), PIPELINE),
    "cp2, adapters": (dict(lora=True), CP2),
    "cp2-tp2-sp, adapters, full recompute": (dict(lora=True, train=FULL), TENSOR),
    "cp2-pp2, adapters, chunks": (dict(lora=True, train=CHUNKS), PIPELINE),
}


@pytest.fixture(scope="module")
def alone(pool):
    """Of one process, by what changes the result."""

    @functools.cache
    def run(case):
        settings = dict(CASES[case][0])
        settings["attention"] = {**settings.get("attention", {}), **PLAIN}
        trains = settings.pop("train", {}).get("trains")
        if trains:
            settings["train"] = {"trains": trains}
        (found,) = pool.run(step_gradients, 1, tree_of(**settings), PACKS, False)
        return found

    return run


def together(results):
    """Gradients by key, put together; every rank that has a piece has the same."""
    found, filled = {}, {}
    for key, offset, shape, data in (piece for one in results for piece in one.pieces):
        tensor = found.setdefault(key, torch.zeros(shape))
        there = filled.setdefault(key, torch.zeros(shape, dtype=torch.bool))
        place = spans(offset, data.shape)
        data = data.view_as(tensor[place])
        if there[place].any():
            assert torch.equal(tensor[place], data), f"{key}: ranks differ"
        tensor[place], there[place] = data, True
    assert all(there.all() for there in filled.values())
    return found


@pytest.mark.parametrize("case", CASES)
def test_every_gradient_is_that_of_one_process(pool, alone, case):
    settings, parallel = CASES[case]
    dp = parallel.get("dp", 1)
    layout = {key: value for key, value in parallel.items() if key != "dp"}
    tree = {**tree_of(**settings), "parallel": layout}
    shared = settings.get("attention", {}).get("t2v_position") != "rope"
    ranks = dp * parallel["cp"] * parallel.get("tp", 1) * parallel.get("pp", 1)
    expected = alone(case)
    results = pool.run(step_gradients, ranks, tree, PACKS, shared)
    for one in results:
        assert one.loss == pytest.approx(expected.loss, rel=1e-5)
        assert one.norm == pytest.approx(expected.norm, rel=1e-5)
    found, wanted = together(results), together([expected])
    assert found.keys() == wanted.keys() and wanted
    problems = []
    for key, like in wanted.items():
        largest, distance = like.abs().max(), (found[key] - like).abs().max()
        assert largest > 0, key
        if distance > 1e-5 * largest:
            problems.append(f"{key}: {float(distance / largest):.2g} of the largest apart")
    assert not problems
