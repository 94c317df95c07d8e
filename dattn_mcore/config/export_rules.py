"""What the Hugging Face architecture of a model's family can hold; one line per breach.

A model is trained to be used: one that no export can express is refused before it is trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from dattn_mcore.architectures import language_models
from dattn_mcore.architectures.records import HELD_BY_ALL, Breach, LanguageModel
from dattn_mcore.config.schema import Config, LlmConfig, ModelConfig

SELECT_LAYERS = (-1, -2)  # of a tower: all layers, or all but the last


def export(config: Config) -> Iterator[str]:
    """The run's model as its family has it."""
    yield from not_exportable(config.model)


def not_exportable(model: ModelConfig) -> Iterator[str]:
    """Why no Hugging Face model of the family is this one; nothing where one is."""
    if model.family not in language_models():
        return  # refused as a choice
    record = language_models()[model.family]
    for breach in (*_not_held(record, model.llm), *record.breaches(model.llm)):
        value = as_yaml(getattr(model.llm, breach.field))
        yield (
            f"model.llm.{breach.field}={value} cannot be exported: model.family={model.family} has "
            f"{breach.rule}; use that, or another model.family"
        )
    if model.vision.select_layer not in SELECT_LAYERS:
        yield (
            f"model.vision.select_layer={model.vision.select_layer} cannot be exported: it must "
            "be -1 (all layers) or -2 (without the last)"
        )


def _not_held(record: LanguageModel, llm: LlmConfig) -> Iterator[Breach]:
    """Sizes that the family's configuration cannot say, and that are not as by default."""
    default = LlmConfig(head_dim=llm.head_dim)
    for field in dataclasses.fields(llm):
        value, expected = getattr(llm, field.name), getattr(default, field.name)
        same = value == expected
        if field.name == "query_scale":
            same = value in (expected, llm.head_dim)  # null means the latter
        if not same and field.name not in (*HELD_BY_ALL, *record.holds):
            yield Breach(field.name, f"{field.name}={as_yaml(expected)}")


def as_yaml(value: Any) -> str:
    """A setting as in a YAML file, on one line; of a section what is not as by default."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        unlike = [f for f in dataclasses.fields(value) if getattr(value, f.name) != f.default]
        names = [field.name for field in unlike or dataclasses.fields(value)[:1]]
        return f"{{{', '.join(f'{name}: {as_yaml(getattr(value, name))}' for name in names)}}}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(as_yaml, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)
