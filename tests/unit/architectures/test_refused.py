"""What is not covered is refused with its reason, for whatever transformers knows."""

import json

import pytest
from transformers import CONFIG_MAPPING, AutoConfig

from dattn_mcore.architectures import language_models
from dattn_mcore.errors import CheckpointError
from tools.checkpoint_convert.raw_folders import text_config

REASONS = {
    "gpt_oss": "attention sinks",
    "qwen3_next": "linear attention.*output gates",
    "qwen3_5": "linear attention.*output gates",
    "qwen3_moe": "experts",
    "mixtral": "experts",
    "mistral4": "experts",
    "deepseek_v3": "experts",
    "minicpm3": "compressed keys and values",
    "qwen2_5_vl": "M-RoPE",
    "qwen3_vl": "M-RoPE",
    "paligemma": "a model of images and text",
    "gemma4_text": "embeddings of each layer",
    "olmo2": "no architecture here describes it",
}


@pytest.mark.parametrize("model_type", [name for name in REASONS if name in CONFIG_MAPPING])
def test_one_line_with_the_reason(tmp_path, model_type):
    fields = AutoConfig.for_model(model_type).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(fields, default=str))
    with pytest.raises(CheckpointError, match=REASONS[model_type]) as raised:
        text_config(tmp_path)
    (line,) = str(raised.value).splitlines()
    assert f"model_type is {model_type!r}" in line
    assert line.endswith(", ".join(record.model_type for record in language_models().values()))
