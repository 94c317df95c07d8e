"""Small random D-Attn models and inputs for the tests of the Hugging Face side."""

from __future__ import annotations

import torch
from transformers import (
    Aimv2VisionConfig,
    CLIPVisionConfig,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    Ministral3Config,
    MistralConfig,
    Olmo2Config,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
    SmolLM3Config,
)

from dattn_mcore.hf import DattnConfig, DattnForConditionalGeneration

VOCAB = 50
IMAGE = 49  # placeholder token


def layer_norms(attention_input=None, attention_output=None, mlp_input=None, mlp_output=None):
    """Names of a layer's norms by their place."""
    return {
        "attention_input": attention_input,
        "attention_output": attention_output,
        "mlp_input": mlp_input,
        "mlp_output": mlp_output,
    }


def features(**others):
    """Features of a plain language model, but for what is given."""
    plain = {
        "activation": "silu",
        "norms": layer_norms("input_layernorm", mlp_input="post_attention_layernorm"),
        "zero_centered_gamma": False,
        "scale_embeddings": False,
        "qkv_bias": False,
        "qk_norm": (),
    }
    return plain | others


_GEMMA = {
    "activation": "gelu_tanh",
    "norms": layer_norms(
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "zero_centered_gamma": True,
    "scale_embeddings": True,
}
TEXT_FEATURES = {
    "mistral": features(),
    "llama": features(),
    "ministral3": features(),
    "olmo2": features(
        norms=layer_norms(
            attention_output="post_attention_layernorm", mlp_output="post_feedforward_layernorm"
        ),
        qk_norm=("heads", "head_dim"),
    ),
    "qwen2": features(qkv_bias=True),
    "qwen3": features(qk_norm=("head_dim",)),
    "smollm3": features(),
    "gemma2": features(**_GEMMA),
    "gemma3": features(**_GEMMA, qk_norm=("head_dim",)),
}
VISION_FEATURES = {
    "siglip": {"class_row": False, "final_norm": True},
    "clip": {"class_row": True, "final_norm": False},
    "aimv2": {"class_row": False, "final_norm": True},
}
LAST_NORMS = {"siglip": "post_layernorm", "clip": "post_layernorm", "aimv2": "rms_norm"}


def text_config(family: str, **changes):
    """Three layers, 4 heads in 2 groups, head_dim 8."""
    common = dict(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    if family == "mistral":
        return MistralConfig(**{**common, "sliding_window": None, **changes})
    if family == "llama":
        rope = {
            "rope_type": "llama3",
            "rope_theta": 100.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
        return LlamaConfig(**{**common, "rope_parameters": rope, **changes})
    if family == "ministral3":
        rope = {  # four frequencies: one as it was, one divided, two between
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 8.0,
            "original_max_position_embeddings": 4,
            "beta_fast": 0.5,
            "beta_slow": 0.05,
            "truncate": False,
            # Larger ones sharpen the softmax of these large weights until float32 rounds at 2e-5.
            "attention_factor": 1.1,
            "llama_4_scaling_beta": 0.2,
        }
        ministral3 = {"rope_parameters": rope, "max_position_embeddings": 32}
        return Ministral3Config(**{**common, **ministral3, **changes})
    if family == "smollm3":
        return SmolLM3Config(**{**common, "no_rope_layers": [1, 0, 1], **changes})
    if family == "olmo2":
        return Olmo2Config(**{**common, **changes})
    if family in ("qwen2", "qwen3"):
        return (Qwen2Config if family == "qwen2" else Qwen3Config)(**{**common, **changes})
    if family == "gemma3":
        rope = {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        }
        types = ["sliding_attention", "sliding_attention", "full_attention"]
        gemma3 = {"query_pre_attn_scalar": 16, "sliding_window": 6, "layer_types": types}
        return Gemma3TextConfig(**{**common, **gemma3, "rope_parameters": rope, **changes})
    gemma = dict(
        query_pre_attn_scalar=16,
        sliding_window=6,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=5.0,
    )
    return Gemma2Config(**{**common, **gemma, **changes})


def vision_config(kind: str, **changes):
    """Two layers, 3 x 3 patches."""
    common = dict(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=12,
        patch_size=4,
    )
    if kind == "aimv2":
        return Aimv2VisionConfig(**{**common, "use_head": False, **changes})
    config = SiglipVisionConfig if kind == "siglip" else CLIPVisionConfig
    return config(**{**common, **changes})


def make_model(
    family: str = "mistral",
    kind: str = "siglip",
    *,
    seed: int = 0,
    text=None,
    vision=None,
    **changes,
) -> DattnForConditionalGeneration:
    """A model with large random weights everywhere, so that every term of it matters."""
    config = DattnConfig(
        text_config=text_config(family, **(text or {})),
        vision_config=vision_config(kind, **(vision or {})),
        text_features=TEXT_FEATURES[family],
        vision_features=VISION_FEATURES[kind],
        vision_last_norm=LAST_NORMS[kind],
        image_token_id=IMAGE,
        **{"projector_hidden_size": 40, **changes},
    )
    model = DattnForConditionalGeneration(config).eval()
    randomize(model, seed)
    return model


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Fills parameters with values that give logits of order one and sharp attention."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "q_proj" in name or "k_proj" in name:
                parameter.copy_(noise * 0.4)
            elif "norm" in name and name.endswith("weight"):
                parameter.add_(noise * 0.2)
            else:
                parameter.copy_(noise * (0.5 if "embed" in name else 0.2))


def pixels(images: int, seed: int = 0) -> torch.Tensor:
    """Random pixel values [images, 3, 12, 12]."""
    return torch.randn(images, 3, 12, 12, generator=torch.Generator().manual_seed(100 + seed))


def ids(*tokens: int) -> torch.Tensor:
    """One sample [1, columns]."""
    return torch.tensor([tokens])
