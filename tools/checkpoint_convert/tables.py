"""The table of a whole model, and the check that every key is accounted for."""

from __future__ import annotations

from collections import Counter
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
DTYPES = (torch.bfloat16, torch.float32, torch.float16)  # of weights
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


def check_keys(
    where: str,
    expected: Mapping[str, Shape],
    found: Mapping[str, torch.Size | Shape],
    dtypes: Mapping[str, torch.dtype],
) -> None:
    """Checks that exactly the expected tensors are there, and that each part has one dtype.

    Raises:
        CheckpointError: naming every missing, extra, wrongly shaped and wrongly typed tensor.
    """
    problems = [f"missing {key}" for key in expected if key not in found]
    problems += [f"extra {key}" for key in found if key not in expected]
    problems += [
        f"{key} is {list(found[key])} instead of {list(shape)}"
        for key, shape in expected.items()
        if key in found and tuple(found[key]) != shape
    ]
    known = {key: dtypes[key] for key in expected if key in found}
    usual = {
        part: Counter(dtype for key, dtype in known.items() if part_of(key) == part)
        for part in {part_of(key) for key in known}
    }
    for key, dtype in known.items():
        wanted = next((d for d, _ in usual[part_of(key)].most_common() if d in DTYPES), None)
        if dtype != wanted:
            names = [str(d or DTYPES[0]).removeprefix("torch.") for d in (dtype, wanted)]
            problems.append(f"{key} is {names[0]} instead of {names[1]}")
    if problems:
        raise CheckpointError(
            f"{where}: {len(problems)} tensors do not fit the configuration: "
            f"{'; '.join(problems)}; is this another model?"
        )


def part_of(name: str) -> str:
    """The part of the model that a tensor (by either side's name) belongs to.

    Parts may differ in dtype; row and column positions are float32 in every model.
    """
    if "_position.fc" in name:
        return "positions"
    if name.startswith(("vision.", siglip.PREFIX)):
        return "vision"
    return "projector" if name.startswith(("projector.", projector.PREFIX)) else "llm"
