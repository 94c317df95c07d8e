"""Model configurations of the trainer to those of Hugging Face, and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPVisionConfig, Gemma2Config, MistralConfig, SiglipVisionConfig

import dattn_mcore
from dattn_mcore.config.export_rules import FIXED, not_exportable
from dattn_mcore.config.schema import (
    AttentionConfig,
    LlmConfig,
    ModelConfig,
    ProjectorConfig,
    VisionConfig,
)
from dattn_mcore.errors import CheckpointError, DattnError
from dattn_mcore.hf import AUTO_MAP, TESTED_TRANSFORMERS, DattnConfig

MAX_POSITIONS = {"mistral": 32768, "gemma2": 8192}  # of the original models; informative only
# Of towers.
ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh", "gelu": "gelu", "quick_gelu": "quick_gelu"}


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

    bos: int
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
        text_config=_text_to_hf(model.family, model.llm, ids, dtype),
        vision_config=_vision_to_hf(model.vision, dtype),
        v2v=attention.v2v,
        t2v_position=attention.t2v_position,
        merge=attention.merge,
        visual_positions=model.visual_positions,
        projector_hidden_size=model.projector.ffn_hidden_size,
        projector_norm_eps=model.projector.norm_eps,
        projector_output_norm_init=model.projector.output_norm_init,
        vision_feature_layer=model.vision.select_layer,
        image_token_id=ids.image,
        dtype=dtype,
    )
    for name, value in records().items():
        setattr(config, name, value)
    return config


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
    model = ModelConfig(
        family=config.text_config.model_type,
        visual_positions=config.visual_positions,
        llm=text_from_hf(config.text_config, vocab_pad_multiple),
        vision=vision_from_hf(config.vision_config, config.vision_feature_layer),
        projector=projector,
    )
    _check_exportable(model)
    return model, AttentionConfig(
        v2v=config.v2v, t2v_position=config.t2v_position, merge=config.merge
    )


def _check_exportable(model: ModelConfig) -> None:
    if model.family not in FIXED:
        raise CheckpointError(
            f"model.family is {model.family!r}; it must be one of {', '.join(FIXED)}"
        )
    problems = list(not_exportable(model))
    if problems:
        raise CheckpointError("; ".join(problems))
    allowed = {"siglip": SiglipVisionConfig, "clip": CLIPVisionConfig}
    if model.vision.kind not in allowed or model.vision.activation not in ACTIVATIONS:
        raise CheckpointError(
            f"model.vision: kind={model.vision.kind!r}, activation={model.vision.activation!r}; "
            f"kind must be one of {', '.join(allowed)}, activation of {', '.join(ACTIVATIONS)}"
        )


def _text_to_hf(family: str, llm: LlmConfig, ids: TokenIds, dtype: torch.dtype) -> Any:
    common: dict[str, Any] = {
        "vocab_size": llm.vocab_size,
        "hidden_size": llm.hidden_size,
        "intermediate_size": llm.ffn_hidden_size,
        "num_hidden_layers": llm.num_layers,
        "num_attention_heads": llm.num_attention_heads,
        "num_key_value_heads": llm.num_query_groups,
        "head_dim": llm.head_dim,
        "rms_norm_eps": llm.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": llm.rotary_base},
        "max_position_embeddings": MAX_POSITIONS[family],
        "sliding_window": llm.sliding_window,
        "tie_word_embeddings": llm.tie_embeddings,
        "initializer_range": llm.init_std,
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos,
        "pad_token_id": ids.pad if ids.pad < llm.vocab_size else None,
        "dtype": dtype,
    }
    if family == "mistral":
        return MistralConfig(**common)
    windowed = [
        llm.sliding_window is not None and layer % llm.sliding_window_every == 0
        for layer in range(llm.num_layers)
    ]
    return Gemma2Config(
        **common,
        query_pre_attn_scalar=int(llm.query_scale or llm.head_dim),
        attn_logit_softcapping=llm.attention_softcap,
        final_logit_softcapping=llm.final_softcap,
        layer_types=["sliding_attention" if w else "full_attention" for w in windowed],
    )


def text_from_hf(text: Any, vocab_pad_multiple: int) -> LlmConfig:
    """Sizes of a Mistral or Gemma 2 configuration.

    Raises:
        CheckpointError: it has a setting that cannot be trained.
    """
    gemma = text.model_type == "gemma2"
    activation = text.hidden_activation if gemma else text.hidden_act
    expected = "gelu_pytorch_tanh" if gemma else "silu"
    if activation != expected:
        raise CheckpointError(
            f"config.json: the activation of {text.model_type} is {activation!r}; it must be "
            f"{expected!r}"
        )
    if text.rope_parameters["rope_type"] != "default" or getattr(text, "attention_bias", False):
        raise CheckpointError(
            f"config.json: text_config has rope_type {text.rope_parameters['rope_type']!r} and "
            f"attention_bias {getattr(text, 'attention_bias', False)}; only 'default' and False "
            "can be trained"
        )
    every = _window_every(text) if gemma else 1
    return LlmConfig(
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        ffn_hidden_size=text.intermediate_size,
        num_attention_heads=text.num_attention_heads,
        num_query_groups=text.num_key_value_heads,
        head_dim=text.head_dim,
        vocab_size=text.vocab_size,
        vocab_pad_multiple=vocab_pad_multiple,
        norm_eps=text.rms_norm_eps,
        rotary_base=float(text.rope_parameters["rope_theta"]),
        activation="gelu_tanh" if gemma else "silu",
        zero_centered_gamma=gemma,
        post_norms=gemma,
        attention_softcap=text.attn_logit_softcapping if gemma else None,
        final_softcap=text.final_logit_softcapping if gemma else None,
        query_scale=float(text.query_pre_attn_scalar) if gemma else None,
        sliding_window=text.sliding_window if every else None,
        sliding_window_every=every or 1,
        scale_embeddings=gemma,
        tie_embeddings=text.tie_word_embeddings,
        init_std=text.initializer_range,
    )


def _window_every(text: Any) -> int:
    """The n of "layers 0, n, 2n, ... have the window"; 0: none has.

    Raises:
        CheckpointError: the windowed layers follow another rule.
    """
    windowed = [i for i, kind in enumerate(text.layer_types) if kind == "sliding_attention"]
    if not windowed or text.sliding_window is None:
        return 0
    every = windowed[1] if len(windowed) > 1 else text.num_hidden_layers
    if windowed != list(range(0, text.num_hidden_layers, every)):
        raise CheckpointError(
            f"config.json: layer_types has its window on layers {windowed}; only every n-th layer "
            "from the first on can be trained"
        )
    return every


def _vision_to_hf(vision: VisionConfig, dtype: torch.dtype) -> Any:
    common: dict[str, Any] = {
        "hidden_size": vision.hidden_size,
        "intermediate_size": vision.ffn_hidden_size,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_attention_heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "layer_norm_eps": vision.norm_eps,
        "hidden_act": ACTIVATIONS[vision.activation],
        "dtype": dtype,
    }
    if vision.kind == "siglip":
        return SiglipVisionConfig(**common, vision_use_head=False)
    return CLIPVisionConfig(**common)


def vision_from_hf(vision: Any, select_layer: int) -> VisionConfig:
    """Sizes of a SigLIP or CLIP vision configuration.

    Raises:
        CheckpointError: it has a setting that cannot be trained.
    """
    names = {theirs: ours for ours, theirs in ACTIVATIONS.items()}
    if vision.hidden_act not in names:
        raise CheckpointError(
            f"config.json: vision_config.hidden_act is {vision.hidden_act!r}; it must be one of "
            f"{', '.join(names)}"
        )
    return VisionConfig(
        kind="siglip" if vision.model_type == "siglip_vision_model" else "clip",
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        num_layers=vision.num_hidden_layers,
        hidden_size=vision.hidden_size,
        ffn_hidden_size=vision.intermediate_size,
        num_attention_heads=vision.num_attention_heads,
        norm_eps=vision.layer_norm_eps,
        activation=names[vision.hidden_act],
        select_layer=select_layer,
    )
