"""The planner's parameters and bytes of weights, gradients and optimizer states: exact."""

import pytest

from dattn_mcore.config.load import from_dict, merge
from dattn_mcore.plan.adapter_activations import adapter_bytes
from dattn_mcore.plan.parameters import stage_parameters
from dattn_mcore.plan.rows import rows_of
from dattn_mcore.plan.state_memory import optimizer_bytes, state_memory
from tests.distributed.plan_jobs import built_state
from tests.distributed.small_models import AIMV2, CLIP, GEMMA, SMALL_MODEL
from tests.distributed.visual_jobs import kept_by_layers

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


@pytest.mark.parametrize(
    ("model", "world_size", "parallel", "train"),
    [
        ({}, 1, {}, {}),
        ({}, 4, {"tp": 2}, {"precision": "bf16"}),
        (GEMMA, 4, {"pp": 2}, {"precision": "bf16"}),
        (merge(GEMMA, CLIP), 3, {}, {"precision": "bf16", "trains": ["projector", "llm"]}),
        (AIMV2, 4, {"tp": 2}, {"precision": "bf16"}),
        ({}, 4, {"tp": 2, "pp": 2, "sp": True}, {"precision": "bf16", "trains": ["projector"]}),
        ({"visual_positions": False}, 2, {"pp": 2, "vpp": 2}, {}),
        ({}, 3, {"pp": 3, "first_stage_layers": 2}, {}),
        ({}, 2, {"pp": 2, "vpp": 2}, {"trains": ["projector"]}),
        ({}, 4, {"cp": 2}, {"precision": "bf16"}),
        ({}, 4, {"cp": 2, "tp": 2, "sp": True}, {"precision": "bf16", "trains": ["projector"]}),
    ],
    ids=[
        "fp32",
        "tp2-dp2",
        "tied-pp2-dp2",
        "clip-dp3",
        "aimv2-tp2-dp2",
        "frozen-tp2-pp2",
        "interleaved",
        "uneven",
        "groups-interleaved",
        "cp2-dp2",
        "frozen-cp2-tp2",
    ],
)
def test_states_are_those_of_the_model_that_is_built(pool, model, world_size, parallel, train):
    tree = {"model": merge(SMALL_MODEL, model), "parallel": parallel, "train": train}
    if parallel.get("vpp") and train:
        # Layers 2 and 3 are numbered from 0 again in their chunks.
        patterns = ["vision.layers.1", "decoder.layers.{1..2}.mlp", "output_layer"]
        tree["optim"] = {"groups": [{"patterns": patterns, "trains": True}]}
    config = from_dict(tree)
    for built in pool.run(built_state, world_size, tree):
        stage, copies = built["stage"], built["copies"]
        planned = [
            [(p.name, p.shape, DTYPES[p.dtype], p.trained) for p in chunk]
            for chunk in stage_parameters(config, stage)
        ]
        assert planned == built["parameters"]
        memory = state_memory(config, stage, copies)
        assert memory.weights == built["weights"]
        assert memory.gradients == built["gradients"]
        assert optimizer_bytes(config, stage, copies)[built["copy"]] == built["optimizer"]
        assert memory.optimizer >= built["optimizer"]


ALL_LINEARS = {"targets": ["*.{q,k,v,o,gate,up,down}_proj"], "rank": 4}
# Mostly text: in the last layer visual rows go through keys and values alone, which is not planned.
LAYOUTS = (((False, 4), (True, 64), (False, 900)), ((False, 20), (True, 64), (False, 600)))


@pytest.mark.parametrize(
    ("ranks", "parallel", "lora", "more"),
    [
        (1, {}, {"rank": 20}, {}),
        (1, {}, {"dropout": 0.1}, {}),
        (1, {}, {"dora": True}, {}),
        (1, {}, {"dora": True, "dropout": 0.1}, {"fold_visual_projection": False}),
        (1, {}, {"dropout": 0.1}, {"v2v": "causal", "t2v_position": "rope"}),
        (2, {"tp": 2}, {"rank": 20, "dropout": 0.1, "dora": True}, {}),
        (2, {"tp": 2, "sp": True}, {"rank": 20, "dropout": 0.1, "dora": True}, {}),
    ],
    ids=["rank", "dropout", "dora", "unfolded", "baseline", "tp2", "tp2-sp"],
)
def test_what_adapters_keep(pool, ranks, parallel, lora, more):
    """What a setting of theirs adds, by autograd and by the planner."""
    kept, planned = [], []
    for settings in ({}, lora):
        tree = {
            "model": SMALL_MODEL,
            "parallel": parallel,
            "attention": more,
            "lora": {**ALL_LINEARS, **settings},
            "checkpoint": {"init_from": "runs/base"},
            "train": {"trains": ["llm"]},
        }
        kept.append(pool.run(kept_by_layers, ranks, tree, LAYOUTS)[0])
        config = from_dict(tree)
        layer = adapter_bytes(config, rows_of(config, LAYOUTS, 0), mask_bytes=4)
        planned.append(layer * config.model.llm.num_layers)
    assert planned[0] > 0
    assert kept[1] - kept[0] == pytest.approx(planned[1] - planned[0], rel=0.03)
