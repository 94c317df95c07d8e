"""The table of a whole model, and the check that every key is accounted for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from dattn_mcore.config.schema import LlmConfig, ModelConfig, VisionConfig
from dattn_mcore.errors import CheckpointError
from tools.checkpoint_convert import clip, gemma2, mistral, projector, siglip
from tools.checkpoint_convert.mapping import Entry, Shape

LLM_TABLES: dict[str, Callable[[LlmConfig], list[Entry]]] = {
    "mistral": mistral.table,
    "gemma2": gemma2.table,
}
VISION_TABLES: dict[str, Callable[[VisionConfig, bool], list[Entry]]] = {
    "siglip": siglip.table,
    "clip": clip.table,
}


def model_table(model: ModelConfig) -> list[Entry]:
    """Every tensor of a model, in the order they are written."""
    return [
        *VISION_TABLES[model.vision.kind](model.vision, model.visual_positions),
        *projector.table(model),
        *LLM_TABLES[model.family](model.llm),
    ]


def mcore_shapes(table: list[Entry]) -> dict[str, Shape]:
    """Shape of every Megatron-Core key."""
    return {entry.key: entry.mcore_shape() for entry in table if entry.key is not None}


def hf_shapes(table: list[Entry]) -> dict[str, Shape]:
    """Shape of every Hugging Face name."""
    return {
        name: shape
        for entry in table
        for layer in entry.steps()
        for name, shape in zip(entry.names(layer), entry.parts.values(), strict=True)
    }


def check_keys(where: str, expected: Mapping[str, Shape], found: Mapping[str, torch.Size | Shape]):
    """Checks that exactly the expected tensors are there.

    Raises:
        CheckpointError: naming every missing, extra and wrongly shaped tensor.
    """
    problems = [f"missing {key}" for key in expected if key not in found]
    problems += [f"extra {key}" for key in found if key not in expected]
    problems += [
        f"{key} is {list(found[key])} instead of {list(shape)}"
        for key, shape in expected.items()
        if key in found and tuple(found[key]) != shape
    ]
    if problems:
        raise CheckpointError(
            f"{where}: {len(problems)} tensors do not fit the configuration beside them: "
            f"{'; '.join(problems)}; is this the checkpoint of another model?"
        )
