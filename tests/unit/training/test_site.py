"""What of a machine and its environment is refused before anything is built."""

import pytest
import torch
import torch.distributed as dist

from dattn_mcore.config.load import from_dict
from dattn_mcore.errors import ConfigError
from dattn_mcore.layers.attention import triton_trial
from dattn_mcore.layers.attention.triton_backend import launch_problem
from dattn_mcore.parallel import on_cpu, platform
from dattn_mcore.training import implementation
from dattn_mcore.training.choices import check_same_choices, compile_where_possible
from dattn_mcore.training.implementation import choose_implementation
from dattn_mcore.training.site import (
    attention_variables,
    check_site,
    fp8_without_gpu,
    unordered_variable,
)

GPU = "cu" + "da"  # the word itself belongs to parallel/platform.py and its like
FP8 = {"train": {"precision": "bf16", "fp8": "tensorwise"}}


def test_fp8_where_auto_finds_no_gpu_is_refused(monkeypatch):
    """Whatever of Transformer Engine can be imported: on a CPU it dies while layers are built."""
    monkeypatch.setattr(implementation, "transformer_engine_missing", lambda: None)
    with pytest.raises(ConfigError, match="^train.fp8=tensorwise needs a GPU.*auto finds none"):
        check_site(from_dict(FP8), "cpu", 0)
    assert fp8_without_gpu(from_dict(FP8), "gpu") is None
    assert fp8_without_gpu(from_dict({}), "cpu") is None


@pytest.mark.parametrize(
    ("environment", "wrong"),
    [
        ({}, None),
        ({"NVTE_FLASH_ATTN": "1", "NVTE_FUSED_ATTN": "1"}, None),
        ({"NVTE_FLASH_ATTN": "0"}, "NVTE_FLASH_ATTN"),
        (
            {"NVTE_FLASH_ATTN": "1", "NVTE_FUSED_ATTN": "0", "NVTE_UNFUSED_ATTN": ""},
            "NVTE_FUSED_ATTN NVTE_UNFUSED_ATTN",
        ),
    ],
)
def test_variables_that_megatron_core_refuses_are_named(environment, wrong):
    said = attention_variables(environment)
    if wrong is None:
        assert said is None
        return
    assert said.endswith(f"which Megatron-Core refuses; unset {wrong}") and "\n" not in said


def test_the_variables_are_those_that_megatron_core_asserts(monkeypatch):
    """It must not refuse more than it does here, or this project's line would not be said."""
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
    groups = ProcessGroupCollection(tp=None, cp=None, pp=None, embd=None)
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        for value, refused in (("0", True), ("1", False)):
            monkeypatch.setenv(name, value)
            assert (attention_variables({name: value}) is not None) == refused
            if refused:
                with pytest.raises(AssertionError):
                    LanguageModule(config, groups)
            else:
                LanguageModule(config, groups)


def test_a_variable_against_determinism_is_named():
    name = "NVTE_ALLOW_NONDETERMINISTIC_ALGO"
    ordered = from_dict({"train": {"deterministic": True}})
    assert f"has '1'; unset {name}" in unordered_variable(ordered, {name: "1"})
    assert unordered_variable(ordered, {name: "0"}) is unordered_variable(ordered, {}) is None
    assert unordered_variable(from_dict({}), {name: "1"}) is None


def test_the_command_names_the_variable(monkeypatch, capfd):
    from dattn_mcore.training import main

    monkeypatch.setattr(main, "_set_up_logging", lambda rank: None)  # it is for a whole process
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    assert main.main(["--device=cpu"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: the environment has NVTE_FUSED_ATTN='0', which Megatron-Core")


@pytest.mark.parametrize(
    ("built", "recipe", "refused"),
    [
        ("12.8", "blockwise", True),
        ("12.9", "blockwise", False),
        ("13.0", "blockwise", False),
        ("12.8", "tensorwise", False),
    ],
)
def test_blockwise_needs_a_newer_build_of_pytorch(monkeypatch, built, recipe, refused):
    monkeypatch.setattr(implementation, "transformer_engine_missing", lambda: None)
    monkeypatch.setattr(platform, "_installed", "gpu")
    monkeypatch.setattr(torch.version, GPU, built)
    monkeypatch.setattr(getattr(torch, GPU), "get_device_capability", lambda: (9, 0))
    config = from_dict({"train": {"fp8": recipe, "precision": "bf16"}})
    if not refused:
        assert choose_implementation(config) == "transformer_engine"
        return
    with pytest.raises(ConfigError, match="train.fp8=blockwise needs PyTorch built for") as caught:
        choose_implementation(config)
    assert "12.9 or newer" in str(caught.value) and "is built for 12.8" in str(caught.value)


def test_without_a_compiler_for_triton_pytorch_compiles_nothing(monkeypatch, caplog):
    """Megatron-Core's compiled activations would end the first step instead."""
    called = []

    def launch(device):
        raise RuntimeError("Failed to find C compiler. Please specify via CC.")

    monkeypatch.setattr(on_cpu, "compile_nothing", lambda: called.append(True))
    monkeypatch.setattr(triton_trial, "launch", launch)
    launch_problem.cache_clear()
    assert compile_where_possible(torch.device("cpu")) is None and not called
    assert "Failed to find C compiler" in compile_where_possible(torch.device(GPU))
    launch_problem.cache_clear()
    assert called and "PyTorch compiles nothing in this run: Triton: it cannot la" in caplog.text


def test_ranks_that_found_other_packages_are_named(monkeypatch):
    """A node without a C compiler would compute with another backend, and nobody would know."""
    what = "the attention backend of all layers"
    found = [{what: ("triton", "")}, {what: ("sdpa", "not triton: it cannot launch a kernel")}]

    def gather(everyone, mine):
        everyone[:] = [("first", found[0]), ("second", found[1])]

    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    with pytest.raises(ConfigError) as caught:
        check_same_choices(found[0])
    assert str(caught.value).startswith(
        f"rank 1 on second: {what} is sdpa (not triton: it cannot launch a kernel), and rank 0 on "
        "first has triton; install the same packages on all nodes"
    )
    found[1] = found[0]
    check_same_choices(found[0])
