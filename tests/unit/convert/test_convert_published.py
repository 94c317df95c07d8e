"""Configurations as they are published are those of the shipped files."""

import json
from pathlib import Path

from dattn_mcore.config.load import load_config
from tools.checkpoint_convert.raw_folders import check_fits


def test_published_configurations_are_understood(tmp_path):
    """config.json as Mistral AI, Google and OpenAI publish them, against the shipped files."""
    configs = Path(__file__).resolve().parents[3] / "configs"
    published = {
        "mistral": {
            "model_type": "mistral",
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "vocab_size": 32768,
        },
        "gemma": {
            "model_type": "gemma2",
            "attention_bias": False,
            "attn_logit_softcapping": 50.0,
            "cache_implementation": "hybrid",
            "final_logit_softcapping": 30.0,
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 3584,
            "intermediate_size": 14336,
            "max_position_embeddings": 8192,
            "num_attention_heads": 16,
            "num_hidden_layers": 42,
            "num_key_value_heads": 8,
            "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-06,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "sliding_window_size": 4096,
            "torch_dtype": "float32",
            "vocab_size": 256000,
        },
        "siglip_so400m_384": {
            "model_type": "siglip",
            "text_config": {"model_type": "siglip_text_model", "hidden_size": 1152},
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 1152,
                "image_size": 384,
                "intermediate_size": 4304,
                "num_attention_heads": 16,
                "num_hidden_layers": 27,
                "patch_size": 14,
            },
        },
        "clip_l_336": {
            "model_type": "clip",
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_act": "quick_gelu",
                "hidden_size": 1024,
                "image_size": 336,
                "intermediate_size": 4096,
                "layer_norm_eps": 1e-05,
                "num_attention_heads": 16,
                "num_hidden_layers": 24,
                "patch_size": 14,
                "projection_dim": 768,
            },
        },
    }
    for name, fields in published.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(fields))
    for llm in ("mistral", "gemma"):
        for tower in ("siglip_so400m_384", "clip_l_336"):
            file = tmp_path / "run.yaml"
            file.write_text(f"base: [{configs}/{llm}_aln.yaml, {configs}/models/{tower}.yaml]\n")
            config = load_config(file)
            check_fits(tmp_path / llm, tmp_path / tower, config.model, config.data)
