"""What the rest of the program asks of an architecture: one record a family, one a tower."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from dattn_mcore.architectures.chat import ChatTemplate
from dattn_mcore.architectures.decoder import decoder_table
from dattn_mcore.architectures.encoder import TowerNames
from dattn_mcore.architectures.features import TextFeatures, TowerFeatures
from dattn_mcore.architectures.parameters import Entry
from dattn_mcore.architectures.sizes import LlmConfig

HfConfig = Any  # a configuration of transformers: an object with attributes


class Unsupported(ValueError):
    """A Hugging Face configuration has a setting that cannot be trained; the text says which."""


@dataclass(frozen=True)
class Breach:
    """A size that no Hugging Face model of the family has.

    Attributes:
        field: of `LlmConfig` or `VisionConfig`.
        rule: what the family has instead, as `field=value` or words.
    """

    field: str
    rule: str


def _no_breaches(llm: LlmConfig) -> Iterable[Breach]:
    return ()


@dataclass(frozen=True)
class LanguageModel:
    """A family of language models.

    Attributes:
        name: `model.family`.
        title: as people write it, for messages.
        model_type: of its text configuration in transformers.
        features: what all its models have in common.
        chat: its chat template.
        holds: fields of `LlmConfig`, beside `HELD_BY_ALL`, that its Hugging Face configuration can
            say; those that are not named must have their default.
        breaches: of these, values that its Hugging Face configuration cannot hold.
        to_hf: fields of its Hugging Face configuration beside those that all families share.
        from_hf: values of `LlmConfig` beside those that all families share; raises `Unsupported`.
        max_positions: of the original models, where `to_hf` says nothing of it; informative only.
        table: its parameters, from sizes and features.
    """

    name: str
    title: str
    model_type: str
    features: TextFeatures
    chat: ChatTemplate
    to_hf: Callable[[LlmConfig], dict[str, Any]]
    from_hf: Callable[[HfConfig], dict[str, Any]]
    max_positions: int
    holds: tuple[str, ...] = ()
    breaches: Callable[[LlmConfig], Iterable[Breach]] = _no_breaches
    table: Callable[[LlmConfig, TextFeatures], list[Entry]] = decoder_table


@dataclass(frozen=True)
class Tower:
    """A kind of vision tower.

    Attributes:
        name: `model.vision.kind`.
        title: as people write it, for messages.
        model_type: of its configuration in transformers.
        folder_types: model types of folders that hold it, itself included.
        features: what all its models have in common.
        names: where transformers keeps its tensors.
        image_mean: of pixels as its published models were trained, for folders that do not say it.
        image_std: likewise, the standard deviation.
        norm_eps: field of its Hugging Face configuration that holds `VisionConfig.norm_eps`.
        to_hf: fields of its Hugging Face configuration beside those that all towers share; a folder
            may have other values, which do not concern patches.
        stated: the same; a folder with other values is refused.
    """

    name: str
    title: str
    model_type: str
    folder_types: tuple[str, ...]
    features: TowerFeatures
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    names: TowerNames = TowerNames()
    norm_eps: str = "layer_norm_eps"
    to_hf: dict[str, Any] = field(default_factory=dict)
    stated: dict[str, Any] = field(default_factory=dict)


# Fields of `LlmConfig` that all families have, and their names in a text configuration.
SHARED_SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "init_std": "initializer_range",
}
HELD_BY_ALL = (*SHARED_SIZES, "vocab_pad_multiple", "rotary_base")


def shared_to_hf(llm: LlmConfig) -> dict[str, Any]:
    """Fields of a text configuration that all families have."""
    return {theirs: getattr(llm, ours) for ours, theirs in SHARED_SIZES.items()}


def shared_from_hf(config: HfConfig) -> dict[str, Any]:
    """Values of `LlmConfig` that all families have under the same names."""
    sizes = {
        ours: getattr(config, theirs)
        for ours, theirs in SHARED_SIZES.items()
        if ours != "head_dim"  # which some leave out
    }
    heads = config.hidden_size // config.num_attention_heads
    return {**sizes, "head_dim": getattr(config, "head_dim", None) or heads}
