"""The language models of the shipped stages, as their makers publish them, are those of the files.

What `hf-to-mcore --config configs/MODEL_aln.yaml` checks first. Two of them stand in
test_convert_published.py.
"""

import json
from pathlib import Path

import pytest

from dattn_mcore.config.load import load_config
from dattn_mcore.errors import CheckpointError
from tools.checkpoint_convert.raw_folders import check_fits

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
# Qwen/Qwen3-8B, meta-llama/Llama-3.1-8B, google/gemma-3-4b-pt; the last one leaves out what
# transformers' defaults are.
PUBLISHED = {
    "qwen3_8b": {
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_position_embeddings": 40960,
        "max_window_layers": 36,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "llama3_1_8b": {
        "model_type": "llama",
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    },
    "gemma3_4b": {
        "model_type": "gemma3",
        "text_config": {
            "model_type": "gemma3_text",
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "torch_dtype": "bfloat16",
        "vision_config": {"model_type": "siglip_vision_model", "image_size": 896},
    },
}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "image_size": 384,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
}


@pytest.fixture
def folders(tmp_path):
    """Folders of a language model and of SigLIP."""

    def write(name, fields):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(fields))
        return tmp_path / name

    return write


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations_fit_stage_1(folders, name):
    config = load_config(CONFIGS / f"{name}_aln.yaml")
    llm, tower = folders("llm", PUBLISHED[name]), folders("tower", SIGLIP)
    check_fits(llm, tower, config.model, config.data)


@pytest.mark.parametrize("name", PUBLISHED)
def test_those_of_another_model_do_not(folders, name):
    """The comparison reaches the text part of a folder, nested or not."""
    others = [other for other in PUBLISHED if other != name]
    config = load_config(CONFIGS / f"{others[0]}_aln.yaml")
    llm, tower = folders("llm", PUBLISHED[name]), folders("tower", SIGLIP)
    with pytest.raises(CheckpointError, match=r"model\.family is .* model\.llm\.num_layers is "):
        check_fits(llm, tower, config.model, config.data)
