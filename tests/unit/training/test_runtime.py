"""What a run's settings and its machine decide about how the model is computed."""

import dataclasses
from pathlib import Path

import pytest
import torch

from dattn_mcore.config.load import load_config
from dattn_mcore.errors import ConfigError
from dattn_mcore.layers.runtime import Fp8, Recompute, Runtime
from dattn_mcore.training import implementation, runtime
from dattn_mcore.training.runtime import decide_runtime

FP8 = ("train.precision=bf16", "train.fp8=tensorwise")
# Settings, and the fields that they change, in a process without a GPU.
DECIDED = {
    "precision": (["train.precision=bf16"], {"dtype": torch.bfloat16}),
    "loss-chunk": (["train.loss_chunk=7"], {"loss_chunk": 7}),
    "sp": (["parallel.tp=2", "parallel.sp=true"], {"sequence_parallel": True}),
    "reduce": (["parallel.overlap_grad_reduce=true"], {"overlap_grad_reduce": True}),
    "gather": (["parallel.overlap_param_gather=true"], {"overlap_param_gather": True}),
    "vpp": (
        ["parallel.pp=2", "parallel.vpp=2"],
        {"chunks_per_stage": 2, "deallocate_pipeline_outputs": False},
    ),
    "first-stage": (
        ["parallel.pp=2", "parallel.first_stage_layers=1"],
        {"first_stage_layers": 1},
    ),
    "deterministic": (["train.deterministic=true"], {"deterministic": True}),
    "mean": (["data.image_mean=[0.1, 0.2, 0.3]"], {"image_mean": (0.1, 0.2, 0.3)}),
    "std": (["data.image_std=[0.1, 0.2, 0.3]"], {"image_std": (0.1, 0.2, 0.3)}),
    "full": (
        ["train.recompute=full", "train.recompute_layers=3"],
        {"recompute": Recompute(granularity="full", layers=3)},
    ),
    "selective": (
        ["train.recompute=selective", "train.recompute_modules=[core_attn, mlp]"],
        {"recompute": Recompute(granularity="selective", modules=("core_attn", "mlp"))},
    ),
    "chunk": (
        ["train.recompute_visual_chunk=64"],
        {"recompute": Recompute(visual_chunk=64)},
    ),
}


def test_one_place_chooses_the_implementation():
    package = Path(runtime.__file__).parents[1]
    asking = {
        path.name
        for path in package.rglob("*.py")
        if "choose_implementation(" in path.read_text(encoding="utf-8")
    }
    assert asking == {"implementation.py", "runtime.py"}


def changed(settings):
    """Fields of the runtime that settings change, with their values."""
    plain, found = decide_runtime(load_config(None)), decide_runtime(load_config(None, settings))
    names = [field.name for field in dataclasses.fields(Runtime)]
    pairs = {name: (getattr(plain, name), getattr(found, name)) for name in names}
    return {name: there for name, (here, there) in pairs.items() if here != there}


def test_the_defaults_are_those_of_the_digits_run():
    """On a CPU gradients are added in products, for which a model needs Megatron-Core's DDP."""
    found = decide_runtime(load_config(None))
    assert found == Runtime(gradient_accumulation_fusion=True)


@pytest.mark.parametrize("case", DECIDED)
def test_a_setting_arrives_where_the_model_reads_it(case):
    settings, expected = DECIDED[case]
    assert changed(settings) == expected


@pytest.mark.parametrize(
    ("settings", "fp8"),
    [
        (FP8, Fp8("tensorwise", 1)),
        ((*FP8, "train.fp8_bf16_layers=0"), Fp8("tensorwise", 0)),
        (("train.precision=bf16", "train.fp8=delayed"), Fp8("delayed", 0)),
    ],
)
def test_fp8_with_transformer_engine(monkeypatch, settings, fp8):
    monkeypatch.setattr(implementation, "transformer_engine_missing", lambda: None)
    assert changed(settings) == {
        "fp8": fp8,
        "dtype": torch.bfloat16,
        "implementation": "transformer_engine",
    }


def test_on_a_gpu_the_interleaved_schedule_empties_outputs_and_apex_fuses(monkeypatch):
    device = torch.device("cu" + "da")
    monkeypatch.setattr(runtime, "current_device", lambda: device)
    monkeypatch.setattr(implementation, "current_device", lambda: device)
    monkeypatch.setattr(runtime, "adds_gradients", lambda: True)
    found = decide_runtime(load_config(None, ["parallel.pp=2", "parallel.vpp=2"]))
    assert found.deallocate_pipeline_outputs and found.gradient_accumulation_fusion
    assert found.implementation == "local"  # fp32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["parallel.tp_comm_overlap=true"], "parallel.tp_comm_overlap=true needs Transformer"),
        (
            ["train.recompute=selective", "train.recompute_modules=[layernorm]"],
            "train.recompute_modules with layernorm needs Transformer Engine",
        ),
    ],
)
def test_what_the_local_linears_cannot_do_is_reported(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        decide_runtime(load_config(None, settings))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fp8": Fp8("delayed"), "dtype": torch.bfloat16}, "fp8 needs implementation="),
        ({"tp_comm_overlap": True}, "tp_comm_overlap needs implementation="),
        (
            {"recompute": Recompute(granularity="selective", modules=("layernorm",))},
            "recompute of layernorm needs implementation=",
        ),
        (
            {"fp8": Fp8("delayed"), "implementation": "transformer_engine"},
            "fp8 needs dtype=torch.bfloat16, got torch.float32",
        ),
        (
            {"overlap_grad_reduce": True, "recompute": Recompute(visual_chunk=8)},
            "overlap_grad_reduce cannot go with",
        ),
    ],
)
def test_fields_that_cannot_go_together(fields, message):
    with pytest.raises(ValueError, match=message):
        Runtime(**fields)
