"""Configurations as they are published are those of the shipped files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dattn_mcore.config.load import load_config
from dattn_mcore.errors import CheckpointError
from tools.checkpoint_convert.raw_folders import check_fits, text_config

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


def test_published_configurations_are_understood(tmp_path):
    """config.json as Mistral AI, Google, OpenAI and Apple publish them, against the shipped files."""
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
        # As Apple publishes its AIMv2 since transformers has a class for them; `use_bias` and more
        # are of the publisher's own code, which the folders also hold.
        "aimv2_l_336": {
            "architectures": ["Aimv2VisionModel"],
            "attention_dropout": 0.0,
            "auto_map": {
                "AutoConfig": "configuration_aimv2.AIMv2Config",
                "AutoModel": "modeling_aimv2.AIMv2Model",
                "FlaxAutoModel": "modeling_flax_aimv2.FlaxAIMv2Model",
            },
            "hidden_act": "silu",
            "hidden_size": 1024,
            "image_size": 336,
            "initializer_range": 0.02,
            "intermediate_size": 2816,
            "is_native": False,
            "mlp_bias": False,
            "model_type": "aimv2_vision_model",
            "num_attention_heads": 8,
            "num_channels": 3,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dropout": 0.0,
            "qkv_bias": False,
            "rms_norm_eps": 1e-05,
            "torch_dtype": "float32",
            "use_bias": False,
            "use_head": False,
        },
    }
    for name, fields in published.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(fields))
    for llm in ("mistral", "gemma"):
        for tower in ("siglip_so400m_384", "clip_l_336", "aimv2_l_336"):
            file = tmp_path / "run.yaml"
            file.write_text(f"base: [{CONFIGS}/{llm}_aln.yaml, {CONFIGS}/models/{tower}.yaml]\n")
            config = load_config(file)
            check_fits(tmp_path / llm, tmp_path / tower, config.model, config.data)


_MISTRAL = {
    "head_dim": 128,
    "hidden_act": "silu",
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 131072,
}
# In the forms of the releases of transformers that wrote them: rotary positions were once fields of
# the model's own, and some sizes follow from others.
LANGUAGE_MODELS = {
    "ministral3_8b": {
        **_MISTRAL,
        "model_type": "ministral3",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 262144,
        "num_hidden_layers": 34,
        "rope_parameters": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 16.0,
            "llama_4_scaling_beta": 0.1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 16384,
            "rope_theta": 1000000.0,
            "rope_type": "yarn",
            "type": "yarn",
        },
    },
    "mistral_small_24b": {
        **_MISTRAL,
        "model_type": "mistral",
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "max_position_embeddings": 32768,
        "num_hidden_layers": 40,
        "rope_theta": 100000000.0,
    },
    "olmo2_32b": {
        "model_type": "olmo2",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 100257,
        "eos_token_id": 100257,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "initializer_range": 0.02,
        "intermediate_size": 27648,
        "max_position_embeddings": 4096,
        "num_attention_heads": 40,
        "num_hidden_layers": 64,
        "num_key_value_heads": 8,
        "pad_token_id": 100277,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 500000,
        "tie_word_embeddings": False,
        "vocab_size": 100352,
    },
    "smollm3_3b": {
        "model_type": "smollm3",
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "max_position_embeddings": 65536,
        "max_window_layers": 28,
        "mlp_bias": False,
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0] * 9,
        "num_attention_heads": 16,
        "num_hidden_layers": 36,
        "num_key_value_heads": 4,
        "pretraining_tp": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "vocab_size": 128256,
    },
}


def written(folder, fields):
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_published_language_models_are_the_shipped_ones(tmp_path, name):
    family, llm = text_config(written(tmp_path, LANGUAGE_MODELS[name]))
    shipped = load_config(CONFIGS / f"models/{name}.yaml").model
    same = {"vocab_pad_multiple": shipped.llm.vocab_pad_multiple}
    assert (family, replace(llm, **same)) == (shipped.family, shipped.llm)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("ministral3_8b", {"rope_parameters": {"rope_type": "default"}}, "only 'yarn' can be"),
        ("smollm3_3b", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type is 'yarn'"),
        ("olmo2_32b", {"attention_bias": True}, "attention_bias is True; it must be False"),
        ("smollm3_3b", {"use_sliding_window": True}, "use_sliding_window is True; it must be Fal"),
    ],
)
def test_what_their_configurations_could_also_say_is_refused(tmp_path, name, changes, message):
    with pytest.raises(CheckpointError, match=message) as raised:
        text_config(written(tmp_path, {**LANGUAGE_MODELS[name], **changes}))
    assert "\n" not in str(raised.value)


def test_a_difference_in_rotary_positions_is_reported_as_in_a_file(tmp_path):
    for name in ("llm", "tower"):
        (tmp_path / name).mkdir()
    written(tmp_path / "llm", LANGUAGE_MODELS["ministral3_8b"])
    written(tmp_path / "tower", {"model_type": "siglip_vision_model"})
    config = load_config(
        CONFIGS / "models/ministral3_8b.yaml", ["model.llm.rope.query_scale_beta=0"]
    )
    with pytest.raises(CheckpointError) as raised:
        check_fits(tmp_path / "llm", tmp_path / "tower", config.model, config.data)
    ours = "{kind: yarn, factor: 16.0, original_length: 16384}"
    theirs = ours.replace("}", ", query_scale_beta: 0.1}")
    assert f"model.llm.rope is {theirs} in {tmp_path}/llm and {ours}" in str(raised.value)
