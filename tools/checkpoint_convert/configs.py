"""Model configurations of the trainer to those of Hugging Face, and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

import dattn_mcore
from dattn_mcore.architectures import (
    language_model,
    language_models,
    text_features,
    tower_features,
    vision_tower,
    vision_towers,
)
from dattn_mcore.architectures.activations import ACTIVATIONS
from dattn_mcore.architectures.records import Unsupported, shared_from_hf, shared_to_hf
from dattn_mcore.architectures.shared_rules import check_stated
from dattn_mcore.config.export_rules import not_exportable
from dattn_mcore.config.schema import (
    AttentionConfig,
    LlmConfig,
    ModelConfig,
    ProjectorConfig,
    VisionConfig,
)
from dattn_mcore.errors import CheckpointError, DattnError
from dattn_mcore.hf import AUTO_MAP, TESTED_TRANSFORMERS, DattnConfig
from dattn_mcore.hf.configuration_dattn import TEXT_FEATURES, VISION_FEATURES


@contextmanager
def understanding(file: Path) -> Iterator[None]:
    """Turns what transformers raises over a malformed configuration into one line.

    Raises:
        CheckpointError: naming the file.
    """
    try:
        yield
    except DattnError:
        raise
    except Exception as error:  # its parts raise whatever they stumble over
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{file} is malformed ({type(error).__name__}: {reason}); copy the folder again"
        ) from error


@dataclass(frozen=True)
class TokenIds:
    """Ids that an exported configuration names."""

    bos: int | None
    eos: int
    pad: int
    image: int
    stop: tuple[int, ...]


def to_hf(
    model: ModelConfig, attention: AttentionConfig, ids: TokenIds, dtype: torch.dtype
) -> DattnConfig:
    """Translates a trainer's configuration.

    Raises:
        CheckpointError: it says what the Hugging Face architecture of its family cannot do.
    """
    _check_exportable(model)
    config = DattnConfig(
        text_config=text_to_hf(model, ids, dtype),
        vision_config=vision_to_hf(model.vision, dtype),
        **features_of(model),
        v2v=attention.v2v,
        t2v_position=attention.t2v_position,
        merge=attention.merge,
        visual_positions=model.visual_positions,
        projector_hidden_size=model.projector.ffn_hidden_size,
        projector_norm_eps=model.projector.norm_eps,
        projector_output_norm_init=model.projector.output_norm_init,
        vision_feature_layer=model.vision.select_layer,
        vision_last_norm=vision_tower(model.vision.kind).names.final_norm,
        image_token_id=ids.image,
        dtype=dtype,
    )
    for name, value in records().items():
        setattr(config, name, value)
    return config


def features_of(model: ModelConfig) -> dict[str, dict[str, Any]]:
    """What config.json says of the architectures, for code that knows none by name."""
    text, tower = asdict(text_features(model)), asdict(tower_features(model))
    return {
        "text_features": {name: text[name] for name in TEXT_FEATURES},
        "vision_features": {name: tower[name] for name in VISION_FEATURES},
    }


def with_features(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of an export's config.json, with the features as this release names them.

    Older ones do not name them, or have words for norms, and yes or no for norms of heads.
    """
    text_features = fields.get("text_features")
    if text_features is not None and not isinstance(text_features.get("norms"), str):
        return fields
    family = {record.model_type: name for name, record in language_models().items()}
    kind = {record.model_type: name for name, record in vision_towers().items()}
    text, tower = fields["text_config"]["model_type"], fields["vision_config"]["model_type"]
    if text not in family or tower not in kind:
        raise CheckpointError(f"config.json: model types {text!r} and {tower!r} are unknown")
    model = ModelConfig(family=family[text], vision=VisionConfig(kind=kind[tower]))
    return {**fields, **features_of(model)}


def records() -> dict[str, Any]:
    """What config.json says of the code beside it, whatever the model.

    transformers adds `transformers_version`, the release that wrote the file.
    """
    return {
        "architectures": ["DattnForConditionalGeneration"],
        "auto_map": dict(AUTO_MAP),
        "dattn_mcore_version": dattn_mcore.__version__,
        "tested_transformers": list(TESTED_TRANSFORMERS),
    }


def from_hf(config: DattnConfig, vocab_pad_multiple: int) -> tuple[ModelConfig, AttentionConfig]:
    """Translates an exported configuration back."""
    projector = ProjectorConfig(
        ffn_hidden_size=config.projector_hidden_size,
        output_norm_init=config.projector_output_norm_init,
        norm_eps=config.projector_norm_eps,
    )
    family, llm = text_from_hf(config.text_config, vocab_pad_multiple)
    model = ModelConfig(
        family=family,
        visual_positions=config.visual_positions,
        llm=llm,
        vision=vision_from_hf(config.vision_config, config.vision_feature_layer),
        projector=projector,
    )
    _check_exportable(model)
    words: Any = config  # which DattnConfig has checked
    return model, AttentionConfig(v2v=words.v2v, t2v_position=words.t2v_position, merge=words.merge)


def _check_exportable(model: ModelConfig) -> None:
    for setting, known, value in (
        ("model.family", language_models(), model.family),
        ("model.vision.kind", vision_towers(), model.vision.kind),
        ("model.vision.activation", ACTIVATIONS, model.vision.activation),
    ):
        if value not in known:
            raise CheckpointError(f"{setting} is {value!r}; it must be one of {', '.join(known)}")
    problems = list(not_exportable(model))
    if model.video.enabled:
        problems.append(
            "model.video.enabled is true, and the exported model has no positions in time yet; "
            "export a model of images"
        )
    if problems:
        raise CheckpointError("; ".join(problems))


def text_to_hf(model: ModelConfig, ids: TokenIds, dtype: torch.dtype) -> Any:
    """The configuration of the language model in transformers."""
    record = language_model(model.family)
    return AutoConfig.for_model(
        record.model_type,
        **{
            "max_position_embeddings": record.max_positions,
            **shared_to_hf(model.llm),
            **record.to_hf(model.llm),
        },
        bos_token_id=ids.bos,
        eos_token_id=ids.eos,
        pad_token_id=ids.pad if ids.pad < model.llm.vocab_size else None,
        dtype=dtype,
    )


def text_from_hf(text: Any, vocab_pad_multiple: int) -> tuple[str, LlmConfig]:
    """Family and sizes of a text configuration.

    Raises:
        CheckpointError: it has a setting that cannot be trained, or is of an unknown family.
    """
    records = {record.model_type: record for record in language_models().values()}
    if text.model_type not in records:
        raise CheckpointError(
            f"config.json: model_type is {text.model_type!r}; a language model must be one of "
            f"{', '.join(records)}"
        )
    record = records[text.model_type]
    try:
        sizes = {**shared_from_hf(text), **record.from_hf(text)}
    except Unsupported as error:
        raise CheckpointError(f"config.json: {text.model_type}: {error}") from None
    return record.name, LlmConfig(**sizes, vocab_pad_multiple=vocab_pad_multiple)


def vision_to_hf(vision: VisionConfig, dtype: torch.dtype) -> Any:
    """The configuration of the vision tower in transformers."""
    record = vision_tower(vision.kind)
    return AutoConfig.for_model(
        record.model_type,
        hidden_size=vision.hidden_size,
        intermediate_size=vision.ffn_hidden_size,
        num_hidden_layers=vision.num_layers,
        num_attention_heads=vision.num_attention_heads,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        hidden_act=ACTIVATIONS[vision.activation].hugging_face,
        dtype=dtype,
        **{record.norm_eps: vision.norm_eps},
        **record.to_hf,
        **record.stated,
    )


def vision_from_hf(vision: Any, select_layer: int) -> VisionConfig:
    """Sizes of a tower's configuration.

    Raises:
        CheckpointError: it has a setting that cannot be trained, or is of an unknown kind.
    """
    records = {record.model_type: record for record in vision_towers().values()}
    names = {activation.hugging_face: name for name, activation in ACTIVATIONS.items()}
    for field, known in (("model_type", records), ("hidden_act", names)):
        if (value := getattr(vision, field)) not in known:
            raise CheckpointError(
                f"config.json: vision_config.{field} is {value!r}; it must be one of "
                f"{', '.join(known)}"
            )
    record = records[vision.model_type]
    try:
        check_stated(vision, **record.stated)
    except Unsupported as error:
        raise CheckpointError(f"config.json: {vision.model_type}: {error}") from None
    return VisionConfig(
        kind=record.name,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        num_layers=vision.num_hidden_layers,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.intermediate_size,
        num_attention_heads=vision.num_attention_heads,
        norm_eps=getattr(vision, record.norm_eps),
        activation=names[vision.hidden_act],
        select_layer=select_layer,
    )
