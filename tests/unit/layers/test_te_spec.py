"""Both layer specs have the same parameters and compute the same, without Transformer Engine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dattn_mcore.config.checks import check_config, row_multiple
from dattn_mcore.config.load import from_dict, load_config
from dattn_mcore.errors import ConfigError
from dattn_mcore.models.transformer_configs import llm_transformer_config
from dattn_mcore.parallel import platform
from dattn_mcore.training import implementation
from dattn_mcore.training.implementation import choose_implementation, transformer_engine_missing
from dattn_mcore.training.runtime import decide_runtime
from tests.unit.layers.te_specs import CASES, OTHERS

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def compared():
    """What tests/unit/layers/te_specs.py found, by case."""
    cases = (*CASES, *OTHERS)
    path = os.pathsep.join([str(ROOT / "tests/standins"), str(ROOT)])
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.unit.layers.te_specs", *cases],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return dict(zip(cases, map(json.loads, result.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_names_shapes_and_shards_are_the_same(compared, case):
    for rank in compared[case]:
        assert rank["te"]["parameters"] == rank["local"]["parameters"]
        assert rank["te"]["shards"] == rank["local"]["shards"]
        assert len(rank["te"]["parameters"]) > 30


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_the_same(compared, case):
    """float32, another order of additions: some 1e-6 of the largest entry."""
    for rank in compared[case]:
        assert rank["loss"] < 1e-5
        assert rank["gradient"] < 1e-5


def test_the_second_spec_is_made_of_megatrons_wrappers(compared):
    classes = {name for rank in compared["gemma-clip"] for name in rank["te_classes"]}
    assert {"TextColumnLinear", "KeyValueColumnLinear", "FoldableRowLinearWithPostNorm"} <= classes
    assert {"TEDotProductAttention", "TEColumnParallelLinear", "RMSNorm", "LayerNorm"} <= classes
    assert {"DecomposedSelfAttention", "TransformerLayer"} <= classes


def test_linears_with_adapters_are_megatrons_wrappers_too(compared):
    classes = {name for rank in compared["gemma-dora-tp2-sp"] for name in rank["te_classes"]}
    assert {"AdaptableTextColumn", "AdaptableFoldableRowWithPostNorm", "Adapter"} <= classes
    assert not {"AdaptableFoldableRow", "TextColumnLinear"} & classes


def test_recomputed_norms_in_fp8_have_the_linears_after_them_keep_their_input(compared):
    (kept,) = compared["fp8-norms"]
    after_a_norm = {name for name, all_layers in kept.items() if all(all_layers)}
    assert after_a_norm == {"linear_q", "linear_kv", "linear_fc1"}
    assert not any(kept["linear_proj"] + kept["linear_fc2"])
    assert len(kept["linear_q"]) == 4


def test_overlap_has_buffers_for_fp8_and_for_the_layers_in_bf16(compared):
    (found,) = compared["overlap"]
    # Both budgets (64, 100), padded to 8, and in FP8 to 16 on each of two shards.
    in_bf16, in_fp8 = [64 + 104, 128], [64 + 128, 128]
    assert found == {
        "bf16": [in_bf16, 2, ["none"]],
        "delayed": [in_fp8, 2, ["fp8"]],
        "tensorwise": [in_fp8, 2, ["fp8", "none"]],
        "no-edges": [in_fp8, 2, ["fp8"]],
    }


def test_auto_is_local_on_a_cpu_and_a_missing_package_is_reported():
    assert choose_implementation(from_dict({})) == "local"
    if transformer_engine_missing() is None:
        pytest.skip("Transformer Engine is installed")
    wanted = from_dict({"train": {"transformer_impl": "transformer_engine"}})
    with pytest.raises(ConfigError, match="needs Transformer Engine, and it is not installed"):
        choose_implementation(wanted)
    fp8 = from_dict({"train": {"fp8": "tensorwise", "precision": "bf16"}})
    with pytest.raises(ConfigError, match="train.fp8=tensorwise needs Transformer Engine"):
        choose_implementation(fp8)


def test_a_gpu_without_fp8_is_reported_in_one_line(monkeypatch):
    """An A100; the devices' names are the vendor's."""
    monkeypatch.setattr(implementation, "transformer_engine_missing", lambda: None)
    monkeypatch.setattr(platform, "_installed", "gpu")
    driver = getattr(torch, "cu" + "da")
    monkeypatch.setattr(driver, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    for capability, recipe, refused in (
        ((8, 0), "tensorwise", True),
        ((8, 9), "delayed", False),
        ((8, 9), "blockwise", True),
        ((9, 0), "blockwise", False),
    ):
        monkeypatch.setattr(
            driver, "get_device_capability", lambda capability=capability: capability
        )
        config = from_dict({"train": {"fp8": recipe, "precision": "bf16"}})
        if not refused:
            assert choose_implementation(config) == "transformer_engine"
            continue
        with pytest.raises(ConfigError, match=f"train.fp8={recipe} needs a GPU of compute") as e:
            choose_implementation(config)
        assert "A100" in str(e.value) and "\n" not in str(e.value)


GEMMA = ROOT / "configs/gemma_pt.yaml"
CHUNKS = [
    "train.recompute_visual_chunk=4096",
    "parallel.overlap_grad_reduce=false",
    "parallel.overlap_param_gather=false",
]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.fp8=tensorwise", "train.precision=fp32"], "needs train.precision=bf16"),
        (["train.fp8=delayed", "train.fp8_bf16_layers=1"], "cannot go with train.fp8=delayed"),
        (["train.fp8=tensorwise", "train.fp8_bf16_layers=21"], "must leave some of"),
        (["train.fp8=tensorwise", "train.transformer_impl=local"], "needs Transformer Engine"),
        (["train.fp8=tensorwise", "train.device=cpu"], "needs a GPU"),
        ([*CHUNKS, "train.fp8=tensorwise"], "is not implemented"),
        (["train.fp8=tensorwise", "model.llm.hidden_size=3592"], "multiple of 16"),
        (["train.fp8=blockwise", "model.llm.hidden_size=3600"], "multiple of 128"),
        (["train.fp8=none", "train.fp8_bf16_layers=1"], "needs train.fp8"),
    ],
)
def test_what_fp8_cannot_do_is_refused_in_one_line(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check_config(load_config(GEMMA, settings))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
@pytest.mark.parametrize(
    "model", ["gemma_pt", "mistral_it", "qwen3_8b_pt", "llama3_1_8b_pt", "gemma3_4b_it"]
)
def test_shipped_models_run_in_every_recipe(recipe, model):
    config = load_config(ROOT / f"configs/{model}.yaml", [f"train.fp8={recipe}"])
    check_config(config)
    shards = config.parallel.tp if config.parallel.sp else 1
    assert shards > 1  # so the rows below are those of a shard
    # Transformer Engine's `assert_dim_for_all_gather` wants blocks of 128 rows on each shard.
    assert row_multiple(config) % ((128 if recipe == "blockwise" else 16) * shards) == 0


def test_blockwise_rows_of_one_process_are_padded_as_in_other_recipes():
    settings = ["train.fp8=blockwise", "parallel.tp=1", "parallel.pp=1", "parallel.sp=false"]
    assert row_multiple(load_config(GEMMA, settings)) == 16


@pytest.mark.parametrize(
    ("settings", "first_last", "layers"),
    [
        (["train.fp8=delayed"], False, 0),
        (["train.fp8=tensorwise"], True, 1),
        (["train.fp8=blockwise", "train.fp8_bf16_layers=3"], True, 3),
    ],
)
def test_megatron_core_takes_each_recipe(monkeypatch, settings, first_last, layers):
    monkeypatch.setattr(implementation, "transformer_engine_missing", lambda: None)
    config = load_config(GEMMA, [*settings, "parallel.tp=1", "parallel.pp=1", "parallel.sp=false"])
    found = llm_transformer_config(config.model, decide_runtime(config), tp_size=1, pp_size=1)
    assert found.fp8 == "hybrid" and found.fp8_recipe == config.train.fp8
    assert found.first_last_layers_bf16 is first_last
    assert found.num_layers_at_start_in_bf16 == found.num_layers_at_end_in_bf16 == layers
