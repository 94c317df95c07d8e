"""The cheap ways of visual rows equal the plain one: folded, ended early, chunked, recomputed.

The plain way is `PLAIN` in one process; gradients of single parameters are within 1e-5 of the
largest (fp32 sums in another order). Whole runs, in every layout: `test_features_by_layout`.
"""

import functools

import pytest
import torch

from dattn_mcore.config.load import merge
from tests.distributed.small_models import GEMMA, SMALL_MODEL
from tests.distributed.visual_jobs import (
    oracle_gradients,
    reductions,
    step_memory,
    tower_graph,
    trained_gradients,
)

LAYOUTS = (
    ((False, 3), (True, 16), (False, 9), (True, 32), (False, 5)),
    ((False, 6),),
    ((True, 48), (False, 11)),
)
PLAIN = {"fold_visual_projection": False, "skip_last_visual_rows": False}
SETTINGS = {
    "folded": ({"skip_last_visual_rows": False}, {}),
    "ended-early": ({"fold_visual_projection": False}, {}),
    "both": ({}, {"loss_chunk": 5}),
    "chunked": ({}, {"recompute_visual_chunk": 20}),
    "chunked-plain": (PLAIN, {"recompute_visual_chunk": 96}),
    "chunked-full": ({}, {"recompute_visual_chunk": 37, "recompute": "full"}),
    "chunked-selective": ({}, {"recompute_visual_chunk": 1, "recompute": "selective"}),
}
MODELS = {"mistral": {}, "gemma2": GEMMA}


@pytest.fixture(scope="module")
def gradients_of(pool):
    @functools.cache
    def expected(model):
        tree = {"model": merge(SMALL_MODEL, MODELS[model]), "attention": PLAIN}
        (gradients,) = pool.run(oracle_gradients, 1, tree, LAYOUTS)
        return gradients

    return expected


@pytest.mark.parametrize(
    ("name", "model"),
    [*((name, "mistral") for name in SETTINGS), ("both", "gemma2"), ("chunked-full", "gemma2")],
)
def test_gradients_equal_the_plain_path(pool, gradients_of, model, name):
    attention, train = SETTINGS[name]
    tree = {"model": merge(SMALL_MODEL, MODELS[model]), "attention": attention, "train": train}
    (gradients,) = pool.run(trained_gradients, 1, tree, LAYOUTS)
    expected = gradients_of(model)
    assert gradients.keys() == expected.keys()
    for key, gradient in gradients.items():
        scale = expected[key].abs().max()
        assert scale > 0, key
        torch.testing.assert_close(
            gradient, expected[key], atol=float(1e-5 * scale), rtol=0, msg=key
        )


@pytest.mark.parametrize("sp", [False, True], ids=["tp2", "tp2-sp"])
def test_folding_reduces_once(pool, sp):
    """Visual and text rows of the projection share a reduction, as they do unfolded."""
    counts = set()
    for fold in (False, True):
        tree = {"model": SMALL_MODEL, "attention": {"fold_visual_projection": fold}}
        tree["parallel"] = {"tp": 2, "sp": sp}
        counts |= set(pool.run(reductions, 2, tree, LAYOUTS))
    assert len(counts) == 1 and counts.pop() >= 4 * 4  # layers; two each way


@pytest.mark.parametrize("learns", [False, True], ids=["frozen", "learning"])
def test_a_frozen_tower_keeps_nothing(pool, learns):
    trains = ("vision", "projector") if learns else ("projector",)
    tree = {"model": SMALL_MODEL, "train": {"trains": trains}}
    ((asks, kept),) = pool.run(tower_graph, 1, tree, LAYOUTS)
    assert (asks, kept > 0) == (learns, learns)


def test_chunks_need_a_third_of_the_memory(pool):
    """8,192 visual rows, 16 layers, Mistral's proportions; peak of a whole step."""
    llm = dict(num_layers=16, ffn_hidden_size=224, num_attention_heads=4, num_query_groups=1)
    tree = {
        "model": merge(SMALL_MODEL, {"llm": llm, "vision": {"num_layers": 1}}),
        "data": {"visual_budget": 8192},
        "train": {"trains": ("projector", "llm")},
    }
    layouts = (((True, 8192), (False, 64)),)
    (plain,) = pool.run(step_memory, 1, tree, layouts)
    chunked = merge(tree, {"train": {"recompute_visual_chunk": 512}})
    (peak,) = pool.run(step_memory, 1, chunked, layouts)
    # 16 layers x 8,192 rows x hidden 64 in fp32 is the least that the plain path keeps.
    assert plain > 16 * 8192 * 64 * 4
    assert peak <= plain / 3, f"{peak / 2**20:.0f} of {plain / 2**20:.0f} MiB"
