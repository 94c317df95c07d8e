"""Transformer Engine's layer spec has the local spec's parameters and computes the same."""

from __future__ import annotations

from typing import Any

import pytest

from dattn_mcore.architectures import language_models, vision_towers
from dattn_mcore.config.load import merge
from tests.distributed.small_models import (
    AIMV2,
    CLIP,
    GEMMA,
    GEMMA3,
    LLAMA,
    MINISTRAL3,
    OLMO2,
    QWEN2,
    QWEN3,
    SMOLLM3,
)
from tests.te import spec_jobs

SP = {"parallel": {"tp": 2, "sp": True}}
BASELINE = {"attention": {"v2v": "causal", "t2v_position": "rope"}}
WHOLE = {"attention": {"fold_visual_projection": False, "skip_last_visual_rows": False}}
LORA = {
    "lora": {"targets": ["*_proj"], "rank": 3},
    "train": {"trains": ["llm"]},
    "checkpoint": {"init_from": "not-opened"},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {},
    "gemma2": GEMMA,
    "gemma3": GEMMA3,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "llama": LLAMA,
    "ministral3": MINISTRAL3,
    "smollm3": SMOLLM3,
    "olmo2": OLMO2,
}
ONE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{name: (model, {}) for name, model in FAMILIES.items()},
    "gemma2-clip": (merge(GEMMA, CLIP), {}),
    "baseline": ({}, BASELINE),
    "unfolded": (GEMMA, WHOLE),
    "lora": ({}, merge(LORA, WHOLE)),
}
TWO = {
    **{f"{name}-tp2-sp": (model, SP) for name, model in FAMILIES.items()},
    "tp2": ({}, {"parallel": {"tp": 2}}),
    "aimv2-tp2": (AIMV2, {"parallel": {"tp": 2}}),
    "gemma2-dora-tp2-sp": (GEMMA, merge(merge(LORA, SP), {"lora": {"dora": True}})),
}
CASES = (*ONE, *TWO)


def test_every_family_and_tower_is_compared():
    assert set(FAMILIES) == set(language_models())
    models = [model for model, _ in (*ONE.values(), *TWO.values())]
    towers = {model.get("vision", {}).get("kind", "siglip") for model in models}
    assert towers == set(vision_towers())


@pytest.fixture(scope="module")
def compared(any_te):
    """What each rank found, by case; each test takes one case of it."""
    ranks = [any_te.run(spec_jobs.compare_all, size, cases) for size, cases in ((1, ONE), (2, TWO))]
    return {case: [rank[case] for rank in found] for found in ranks for case in found[0]}


@pytest.mark.parametrize("case", CASES)
def test_names_shapes_and_shards_are_the_same(compared, case):
    for rank in compared[case]:
        assert rank["te"]["parameters"] == rank["local"]["parameters"]
        assert rank["te"]["shards"] == rank["local"]["shards"]
        assert len(rank["te"]["parameters"]) > 30


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_the_same(compared, case):
    """float32, another order of additions: some 1e-7 of the largest entry; adapters some more."""
    for rank in compared[case]:
        assert rank["loss"] < 1e-6
        assert rank["gradient"] < 1e-5


def test_the_second_spec_is_made_of_megatrons_wrappers(compared):
    classes = {name for rank in compared["gemma2-clip"] for name in rank["te_classes"]}
    assert {"TextColumnLinear", "KeyValueColumnLinear", "FoldableRowLinearWithPostNorm"} <= classes
    assert {"TEDotProductAttention", "TEColumnParallelLinear", "RMSNorm", "LayerNorm"} <= classes
    assert {"DecomposedSelfAttention", "TransformerLayer"} <= classes


def test_linears_with_adapters_are_megatrons_wrappers_too(compared):
    classes = {name for rank in compared["gemma2-dora-tp2-sp"] for name in rank["te_classes"]}
    assert {"AdaptableTextColumn", "AdaptableFoldableRowWithPostNorm", "Adapter"} <= classes
    assert not {"AdaptableFoldableRow", "TextColumnLinear"} & classes


def test_recomputed_norms_in_fp8_have_the_linears_after_them_keep_their_input(te):
    (kept,) = te.run(spec_jobs.kept_inputs, 1)
    after_a_norm = {name for name, all_layers in kept.items() if all(all_layers)}
    assert after_a_norm == {"linear_q", "linear_kv", "linear_fc1"}
    assert not any(kept["linear_proj"] + kept["linear_fc2"])
    assert len(kept["linear_q"]) == 4


def test_overlap_has_buffers_for_fp8_and_for_the_layers_in_bf16(te):
    (found,) = te.run(spec_jobs.overlap_buffers, 1)
    # Both budgets (64, 100), padded to 8, and in FP8 to 16 on each of two shards.
    in_bf16, in_fp8 = [64 + 104, 128], [64 + 128, 128]
    assert found == {
        "bf16": [in_bf16, 2, ["NONE"]],
        "delayed": [in_fp8, 2, ["FP8"]],
        "tensorwise": [in_fp8, 2, ["FP8", "NONE"]],
        "no-edges": [in_fp8, 2, ["FP8"]],
    }
