"""Configuration of a D-Attn vision-language model in the Hugging Face form.

This file and its neighbours `*_dattn.py` are copied beside exported weights and loaded from there
as remote code, so they import torch and transformers only.
"""

from __future__ import annotations

from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig

AUTO_MAP = {
    "AutoConfig": "configuration_dattn.DattnConfig",
    "AutoProcessor": "processing_dattn.DattnProcessor",
    "AutoModel": "modeling_dattn.DattnModel",  # without the output head: hidden states
    "AutoModelForImageTextToText": "modeling_dattn.DattnForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_dattn.DattnForConditionalGeneration",
}
IMAGE_PROCESSOR_AUTO_MAP = {"AutoImageProcessor": "image_processing_dattn.DattnImageProcessor"}
# What `text_features` and `vision_features` say, with the values that a name may have; None: see
# `_check_norms` and `_check_qk_norm`.
TEXT_FEATURES: dict[str, tuple[Any, ...] | None] = {
    "activation": ("silu", "gelu_tanh"),
    "norms": None,
    "zero_centered_gamma": (False, True),
    "scale_embeddings": (False, True),
    "qkv_bias": (False, True),
    "qk_norm": None,
}
NORM_PLACES = ("attention_input", "attention_output", "mlp_input", "mlp_output")  # of a layer
HEAD_AXES = ("heads", "head_dim")
VISION_FEATURES: dict[str, tuple[Any, ...] | None] = {
    "class_row": (False, True),
    "final_norm": (False, True),
}
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
        text_config: sizes of the language model, as its own architecture in transformers has them
            (object or dictionary); None: there is none, and no model can be built.
        vision_config: sizes of the vision tower, likewise.
        text_features: how the language model's layers work: `activation` (`silu`, `gelu_tanh`) of
            the gated MLP; `norms` (names of a layer's norms by their place, `NORM_PLACES`; None:
            there is none); `zero_centered_gamma` (norms scale by 1 + weight); `scale_embeddings`
            (rows enter times the root of their width); `qkv_bias` (of queries, keys and values
            alone); `qk_norm` (which of `HEAD_AXES` of queries and keys are normed together before
            they are rotated; none of them: they are not normed).
        vision_features: `class_row` (the tower's first row is no patch, and is dropped);
            `final_norm` (its last norm is for patches).
        v2v: `diagonal` (a visual row's attention output is its own value) or `causal` (baseline).
        t2v_position: `none` (visual keys carry no position) or `rope` (visual and text rows share
            one axis of positions, in reading order).
        merge: `alpha` (one softmax over visual and text keys) or `sum` (one softmax each, added).
        visual_positions: whether the projector adds row and column position embeddings.
        projector_hidden_size: width of the projector's hidden layer.
        projector_norm_eps: epsilon of the projector's norms.
        projector_output_norm_init: start of the last norm's weight in a fresh model.
        vision_feature_layer: -1, all layers of the tower (and its last norm, where that is for
            patches); -2, all layers but the last, without a norm. Layers that are not run do not
            exist in the model.
        vision_last_norm: name of the tower's last norm in transformers.
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
        text_features: dict[str, Any] | None = None,
        vision_features: dict[str, Any] | None = None,
        v2v: str = "diagonal",
        t2v_position: str = "none",
        merge: str = "alpha",
        visual_positions: bool = True,
        projector_hidden_size: int | None = None,
        projector_norm_eps: float = 1e-6,
        projector_output_norm_init: float = 1.0,
        vision_feature_layer: int = -1,
        vision_last_norm: str = "post_layernorm",
        image_token_id: int = 3,
        **kwargs: Any,
    ) -> None:
        self.text_config: Any = _sub_config(text_config, "text_config")
        self.vision_config: Any = _sub_config(vision_config, "vision_config")
        self.text_features = self.vision_features = None
        if text_config is not None:
            self.text_features = _features("text_features", text_features, TEXT_FEATURES)
            _check_norms(self.text_features["norms"])
            _check_qk_norm(self.text_features["qk_norm"])
        if vision_config is not None:
            self.vision_features = _features("vision_features", vision_features, VISION_FEATURES)
        _one_of("v2v", v2v, ("diagonal", "causal"))
        _one_of("t2v_position", t2v_position, ("none", "rope"))
        _one_of("merge", merge, ("alpha", "sum"))
        _one_of("vision_feature_layer", vision_feature_layer, (-1, -2))
        self.v2v = v2v
        self.t2v_position = t2v_position
        self.merge = merge
        self.visual_positions = visual_positions
        width: Any = getattr(self.text_config, "hidden_size", None)
        self.projector_hidden_size: Any = projector_hidden_size or width
        self.projector_norm_eps = projector_norm_eps
        self.projector_output_norm_init = projector_output_norm_init
        self.vision_feature_layer = vision_feature_layer
        self.vision_last_norm = vision_last_norm
        self.image_token_id = image_token_id
        tied = getattr(self.text_config, "tie_word_embeddings", False)
        kwargs.setdefault("tie_word_embeddings", tied)
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


def _sub_config(value: Any, name: str) -> PreTrainedConfig:
    """Returns `value` (configuration, dictionary with `model_type`, or None) as a configuration."""
    if value is None:
        return PreTrainedConfig()
    if not isinstance(value, dict):
        return value
    fields = dict(value)
    if "model_type" not in fields:
        raise ValueError(f"{name} has no model_type, which says whose sizes it holds")
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def _features(
    name: str, given: dict[str, Any] | None, known: dict[str, tuple[Any, ...] | None]
) -> dict[str, Any]:
    """Returns features, each of them named and of a known value."""
    if given is None:
        raise ValueError(
            f"{name} are missing, as in folders of before they were written; renew the folder "
            "with: python -m tools.checkpoint_convert refresh FOLDER"
        )
    if wrong := given.keys() ^ known.keys():
        raise ValueError(f"{name} must be {', '.join(known)}; see {', '.join(sorted(wrong))}")
    for feature, value in given.items():
        if (allowed := known[feature]) is not None:
            _one_of(f"{name}.{feature}", value, allowed)
    return dict(given)


def _check_norms(norms: Any) -> None:
    """Names become attributes of a layer: each is its own, and of a form that no other one has."""
    known = isinstance(norms, dict) and norms.keys() == set(NORM_PLACES)
    names = [name for name in norms.values() if name is not None] if known else []
    named = all(isinstance(name, str) and name.endswith("layernorm") for name in names)
    if not known or not named or len(set(names)) != len(names):
        raise ValueError(
            f"text_features.norms is {norms!r}; it must give {', '.join(NORM_PLACES)} a name each "
            "that ends in layernorm, or None; renew an older folder with: python -m "
            "tools.checkpoint_convert refresh FOLDER"
        )


def _check_qk_norm(axes: Any) -> None:
    if not isinstance(axes, list | tuple) or any(axis not in HEAD_AXES for axis in axes):
        raise ValueError(
            f"text_features.qk_norm is {axes!r}; it must be a list of {' and '.join(HEAD_AXES)}, "
            "or empty"
        )


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(str, allowed))}")


__all__ = ["AUTO_MAP", "IMAGE_PROCESSOR_AUTO_MAP", "TESTED_TRANSFORMERS", "DattnConfig", "releases"]
