"""Gradients that are added into DDP's buffers, in a model that has none."""

import dataclasses

import pytest
import torch

from dattn_mcore.config.load import from_dict
from dattn_mcore.layers.runtime import Runtime
from dattn_mcore.parallel.groups import single_process
from dattn_mcore.training import model as training_model
from dattn_mcore.training.model import build_from_config
from examples.python.own_loop import pack

FUSED = Runtime(gradient_accumulation_fusion=True)
CPU = torch.device("cpu")


def test_a_model_without_ddp_is_built_without(monkeypatch):
    """As on a machine with Transformer Engine, or with Apex's extension."""
    monkeypatch.setattr(training_model, "decide_runtime", lambda config: FUSED)
    config = from_dict({})
    with single_process("cpu") as groups:
        (model,) = build_from_config(config, groups, CPU)
        assert not model.config.gradient_accumulation_fusion
        assert not model.runtime.gradient_accumulation_fusion
        model(pack(config.model, config.attention)).mean().backward()


def test_a_trainer_that_forgets_ddp_is_told_so_before_the_first_layer():
    config = from_dict({})
    with single_process("cpu") as groups:
        (model,) = build_from_config(config, groups, CPU)
        inputs = pack(config.model, config.attention)
        model.runtime = dataclasses.replace(model.runtime, gradient_accumulation_fusion=True)
        with pytest.raises(RuntimeError, match="gradient_accumulation_fusion=True needs Megatron"):
            model(inputs)
        with torch.no_grad():
            model(inputs)
        for parameter in model.decoder.parameters():
            parameter.main_grad = torch.zeros_like(parameter)
        model(inputs)
