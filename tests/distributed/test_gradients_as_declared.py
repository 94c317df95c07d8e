"""Every gradient is what its parameter's marks say: sharded, replicated, or a part of a sum.

Megatron-Core finds the gradients that it must add up over the tensor parallel group by attributes
and by names. A parameter that is marked wrongly trains, and each rank's copy goes its own way. Here
every gradient of a step is compared with one process's: before the reductions each for itself, or
summed, as declared; after them on each rank. Replicas get the same data.
"""

from collections import defaultdict

import pytest
import torch

from dattn_mcore.config.load import merge
from tests.distributed.gradient_jobs import gradients, spans
from tests.distributed.small_models import GEMMA, QWEN2, QWEN3, SMALL_MODEL
from tests.distributed.test_shared_groups import EIGHT

LAYOUTS = (((True, 16), (False, 9)), ((False, 4), (True, 16), (False, 6), (True, 16), (False, 3)))
LORA = {
    "lora": {"targets": ["*.{q,k,v,o,gate,up,down}_proj"], "rank": 3, "alpha": 12.0},
    "train": {"trains": ["projector", "llm"]},
    "checkpoint": {"init_from": "runs/base"},  # checked, not read
}
FROZEN = {"train": {"trains": ["projector"]}}
SHARED = {"model": merge(EIGHT, {"llm": {"num_query_groups": 2}})}
# Model, its other settings, ranks, layout.
CASES = {
    "tp2, norms of heads": (QWEN3, {}, 2, {"tp": 2}),
    "tp2-sp, norms of heads": (QWEN3, {}, 2, {"tp": 2, "sp": True}),
    "tp2-sp, tied, norms after": (GEMMA, {}, 2, {"tp": 2, "sp": True}),
    "pp2, tied": (GEMMA, {}, 2, {"pp": 2}),
    "dp2": ({}, {}, 2, {}),
    "vpp, biases": (QWEN2, {}, 2, {"pp": 2, "vpp": 2}),
    "tp2-sp-dp2, overlap": (QWEN3, {}, 4, {"tp": 2, "sp": True, "overlap_grad_reduce": True}),
    "tp4 on 2 groups, biases": (QWEN2, SHARED, 4, {"tp": 4}),
    "tp2-sp, adapters": ({}, LORA, 2, {"tp": 2, "sp": True}),
    "tp2-sp, frozen": ({}, FROZEN, 2, {"tp": 2, "sp": True}),
}


def tree_of(family, settings):
    return merge({"model": merge(SMALL_MODEL, family)}, settings)


def whole(rows, field):
    """Gradients of one process by key, put together where a key has several pieces."""
    found = {}
    for one in rows:
        tensor = found.setdefault(one.key, torch.zeros(one.shape))
        gradient = getattr(one, field)
        place = spans(one.offset, gradient.shape)
        tensor[place] = gradient.view_as(tensor[place])
    return found


def unlike(gradient, expected):
    """How far apart they are; empty where they are equal but for the order of float32 sums."""
    bound = 1e-5 * max(1.0, float(expected.abs().max())) + 1e-4 * expected.abs()
    distance = (gradient.view_as(expected) - expected).abs()
    return "" if bool((distance <= bound).all()) else f"{float(distance.max()):.3g} apart"


def faults(results, alone):
    """What is not as declared; `alone`: of one process."""
    before, after = whole(alone, "before"), whole(alone, "after")
    held = defaultdict(list)
    for one in (one for rows in results for one in rows):
        held[one.key, one.offset].append(one)
    problems = [f"{key}: on no rank" for key in before if key not in {key for key, _ in held}]
    for (key, offset), ones in held.items():
        place = spans(offset, ones[0].after.shape)
        problems += [
            f"{key}: after, on {one.place}: {words}"
            for one in ones
            if (words := unlike(one.after, after[key][place]))
        ]
        if ones[0].before is None:
            continue
        stages = {one.place[1] for one in ones}  # two hold a tied embedding
        for replica in {one.place[0] for one in ones}:
            mine = [one for one in ones if one.place[0] == replica]
            if ones[0].declared == "partial":
                sums = [torch.stack([one.before for one in mine]).sum(0)]
            elif len(stages) > 1:
                first, last = (
                    [one for one in mine if one.place[1] == stage] for stage in sorted(stages)
                )
                sums = [a.before + b.before for a, b in zip(first, last, strict=True)]
            else:
                sums = [one.before for one in mine]
            problems += [
                f"{key}: before, declared {ones[0].declared}: {words}"
                for gradient in sums
                if (words := unlike(gradient, before[key][place]))
            ]
    return problems


@pytest.fixture(scope="module")
def alone(pool):
    """Of one process, by model and settings."""
    done = {}

    def run(tree):
        key = repr(tree)
        if key not in done:
            (done[key],) = pool.run(gradients, 1, tree, LAYOUTS)
        return done[key]

    return run


@pytest.mark.parametrize("case", CASES)
def test_each_is_as_declared_and_equal_to_one_processs(pool, alone, case):
    family, settings, ranks, parallel = CASES[case]
    tree = tree_of(family, settings)
    expected, norm = alone(tree)
    results = pool.run(gradients, ranks, {**tree, "parallel": parallel}, LAYOUTS)
    rows = [one for found, _ in results for one in found]
    assert not faults([found for found, _ in results], expected)
    assert max(float(one.after.abs().max()) for one in rows) > 1e-4
    for _, of_rank in results:  # each gradient counts once
        assert of_rank == pytest.approx(norm, rel=1e-5)
    kinds = {one.declared for one in rows}
    assert "mean" not in kinds  # no parameter asks for it
    if parallel.get("sp") or (parallel.get("tp") and family in (QWEN3,)):
        assert "partial" in kinds or settings is FROZEN
    if parallel.get("tp"):
        assert "sharded" in kinds


def test_a_parameter_that_is_not_marked_is_found(pool, alone):
    """The fault that this file is for: a norm whose mark of sequence parallelism is missing."""
    tree = tree_of(QWEN3, {})
    expected, _ = alone(tree)
    parallel = {"parallel": {"tp": 2, "sp": True}}
    forgotten = "decoder.final_layernorm.weight"
    results = pool.run(gradients, 2, {**tree, **parallel}, LAYOUTS, forgotten)
    found = faults([rows for rows, _ in results], expected)
    assert {one.partition(":")[0] for one in found} == {forgotten}
    assert any("before, declared replicated" in one for one in found)
    assert any(": after, on " in one for one in found)
