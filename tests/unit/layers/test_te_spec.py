"""When Transformer Engine is taken, and what its FP8 asks of the settings; the layers: `tests/te`."""

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

ROOT = Path(__file__).resolve().parents[3]


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
