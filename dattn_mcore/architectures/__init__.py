"""What each architecture is: one file a language model family, one a vision tower. No torch.

A family's name stands here alone. The rest of the program asks a record (`records`) for what it
needs: features of the layers, sizes to and from Hugging Face, parameters, chat template.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any, TypeVar

from dattn_mcore.architectures import language, towers
from dattn_mcore.architectures.chat import PLAIN, ChatTemplate
from dattn_mcore.architectures.features import TextFeatures, TowerFeatures
from dattn_mcore.architectures.records import LanguageModel, Tower
from dattn_mcore.architectures.sizes import ModelConfig
from dattn_mcore.errors import ConfigError

Record = TypeVar("Record")


@functools.cache
def language_models() -> dict[str, LanguageModel]:
    """Every family of language models, by `model.family`: the modules of `language`."""
    return {record.name: record for record in _records(language)}


@functools.cache
def vision_towers() -> dict[str, Tower]:
    """Every kind of vision tower, by `model.vision.kind`: the modules of `towers`."""
    return {record.name: record for record in _records(towers)}


@functools.cache
def chat_templates() -> dict[str, ChatTemplate]:
    """Every conversation template, by `data.template`: `plain`, and those of the families."""
    chats = (record.chat for record in language_models().values())
    return {chat.name: chat for chat in (PLAIN, *chats)}


def language_model(family: str) -> LanguageModel:
    """The record of a family.

    Raises:
        ConfigError: there is none of this name.
    """
    return _named(language_models(), family, "model.family")


def vision_tower(kind: str) -> Tower:
    """The record of a kind of tower.

    Raises:
        ConfigError: there is none of this name.
    """
    return _named(vision_towers(), kind, "model.vision.kind")


def text_features(model: ModelConfig) -> TextFeatures:
    """What the family of a model's language model has."""
    return language_model(model.family).features


def tower_features(model: ModelConfig) -> TowerFeatures:
    """What the kind of a model's vision tower has."""
    return vision_tower(model.vision.kind).features


def _records(package: ModuleType) -> list[Any]:
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return [importlib.import_module(f"{package.__name__}.{name}").ARCHITECTURE for name in names]


def _named(records: Mapping[str, Record], name: str, setting: str) -> Record:
    if name not in records:
        raise ConfigError(f"{setting}={name!r} is unknown; use one of {', '.join(records)}")
    return records[name]
