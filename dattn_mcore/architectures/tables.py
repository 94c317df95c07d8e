"""The table of parameters of a whole model."""

from __future__ import annotations

from dattn_mcore.architectures import language_model, vision_tower
from dattn_mcore.architectures.encoder import encoder_table
from dattn_mcore.architectures.parameters import Entry
from dattn_mcore.architectures.projector import projector_table
from dattn_mcore.architectures.sizes import ModelConfig


def model_table(model: ModelConfig) -> list[Entry]:
    """Every tensor of a model, in the order of Megatron-Core's modules."""
    return [*tower_table(model), *projector_table(model), *language_table(model)]


def language_table(model: ModelConfig) -> list[Entry]:
    """Every tensor of its language model."""
    record = language_model(model.family)
    return record.table(model.llm, record.features)


def tower_table(model: ModelConfig) -> list[Entry]:
    """Every tensor of its vision tower."""
    record = vision_tower(model.vision.kind)
    return encoder_table(
        model.vision, record.features, record.names, visual_positions=model.visual_positions
    )
