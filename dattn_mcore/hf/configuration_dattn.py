"""Configuration of a D-Attn vision-language model in the Hugging Face form.

This file and its neighbours `*_dattn.py` are copied beside exported weights and loaded from there
as remote code, so they import torch and transformers only.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig

TEXT_MODEL_TYPES = ("mistral", "gemma2")
VISION_MODEL_TYPES = ("siglip_vision_model", "clip_vision_model")
AUTO_MAP = {
    "AutoConfig": "configuration_dattn.DattnConfig",
    "AutoProcessor": "processing_dattn.DattnProcessor",
    "AutoModel": "modeling_dattn.DattnModel",  # without the output head: hidden states
    "AutoModelForImageTextToText": "modeling_dattn.DattnForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_dattn.DattnForConditionalGeneration",
}
IMAGE_PROCESSOR_AUTO_MAP = {"AutoImageProcessor": "image_processing_dattn.DattnImageProcessor"}
# Oldest and newest release of transformers with which this code is tested.
TESTED_TRANSFORMERS = ("5.6", "5.24.0")


def releases() -> str:
    """Half a sentence for messages: which transformers this is, and which are tested."""
    oldest, newest = TESTED_TRANSFORMERS
    return (
        f"transformers is {transformers.__version__}; this code is tested with {oldest} to {newest}"
    )


class DattnConfig(PreTrainedConfig):
    """A text model, a vision tower, the projector between them, and how attention is decomposed.

    Args:
        text_config: Mistral or Gemma 2 configuration (object or dictionary).
        vision_config: SigLIP or CLIP vision configuration (object or dictionary).
        v2v: `diagonal` (a visual row's attention output is its own value) or `causal` (baseline).
        t2v_position: `none` (visual keys carry no position) or `rope` (visual and text rows share
            one axis of positions, in reading order).
        merge: `alpha` (one softmax over visual and text keys) or `sum` (one softmax each, added).
        visual_positions: whether the projector adds row and column position embeddings.
        projector_hidden_size: width of the projector's hidden layer.
        projector_norm_eps: epsilon of the projector's norms.
        projector_output_norm_init: start of the last norm's weight in a fresh model.
        vision_feature_layer: -1, all layers of the tower (and SigLIP's last norm); -2, all layers
            but the last, without a norm. Layers that are not run do not exist in the model.
        image_token_id: token that marks the place of one image in `input_ids`.

    Raises:
        ValueError: if a value is not one of those listed here.
    """

    model_type = "dattn"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}

    def __init__(
        self,
        text_config: Any = None,
        vision_config: Any = None,
        v2v: str = "diagonal",
        t2v_position: str = "none",
        merge: str = "alpha",
        visual_positions: bool = True,
        projector_hidden_size: int | None = None,
        projector_norm_eps: float = 1e-6,
        projector_output_norm_init: float = 1.0,
        vision_feature_layer: int = -1,
        image_token_id: int = 3,
        **kwargs: Any,
    ) -> None:
        self.text_config: Any = _sub_config(text_config, "text_config", TEXT_MODEL_TYPES)
        self.vision_config: Any = _sub_config(vision_config, "vision_config", VISION_MODEL_TYPES)
        _one_of("v2v", v2v, ("diagonal", "causal"))
        _one_of("t2v_position", t2v_position, ("none", "rope"))
        _one_of("merge", merge, ("alpha", "sum"))
        _one_of("vision_feature_layer", vision_feature_layer, (-1, -2))
        self.v2v = v2v
        self.t2v_position = t2v_position
        self.merge = merge
        self.visual_positions = visual_positions
        self.projector_hidden_size = projector_hidden_size or self.text_config.hidden_size
        self.projector_norm_eps = projector_norm_eps
        self.projector_output_norm_init = projector_output_norm_init
        self.vision_feature_layer = vision_feature_layer
        self.image_token_id = image_token_id
        kwargs.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(name, getattr(self.text_config, name, None))
        super().__init__(**kwargs)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of visual rows that one image of the tower's size becomes."""
        side = self.vision_config.image_size // self.vision_config.patch_size
        return side, side

    @property
    def num_vision_layers(self) -> int:
        """Tower layers that are run."""
        return self.vision_config.num_hidden_layers + self.vision_feature_layer + 1


def _sub_config(value: Any, name: str, allowed: tuple[str, ...]) -> PreTrainedConfig:
    """Returns `value` (configuration, dictionary with `model_type`, or None) as a configuration."""
    if value is None:
        value = AutoConfig.for_model(allowed[0])
    elif isinstance(value, dict):
        fields = dict(value)
        model_type = fields.pop("model_type", allowed[0])
        _one_of(f"{name}.model_type", model_type, allowed)
        value = AutoConfig.for_model(model_type, **fields)
    _one_of(f"{name}.model_type", value.model_type, allowed)
    return value


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(str, allowed))}")


__all__ = ["AUTO_MAP", "IMAGE_PROCESSOR_AUTO_MAP", "TESTED_TRANSFORMERS", "DattnConfig", "releases"]
