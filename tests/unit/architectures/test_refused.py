"""What is not covered is refused with its reason, for whatever transformers knows."""

import json
import re

import pytest
from transformers import CONFIG_MAPPING, AutoConfig

from dattn_mcore.architectures import language_models, vision_towers
from dattn_mcore.errors import CheckpointError
from tools.checkpoint_convert.raw_folders import text_config, vision_config

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
    "qwen2_5_omni": "M-RoPE",
    "qwen3_omni_moe": "M-RoPE.*experts",
    "granite": "no architecture here describes it",
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


@pytest.mark.skipif("gemma4_text" not in CONFIG_MAPPING, reason="transformers knows no Gemma 4")
def test_a_gemma_4_without_embeddings_of_each_layer(tmp_path):
    """Its larger sizes have none, and heads of another size in layers without a window."""
    fields = AutoConfig.for_model("gemma4_text", hidden_size_per_layer_input=0).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(fields, default=str))
    with pytest.raises(CheckpointError, match="values that are its keys|heads of another size"):
        text_config(tmp_path)


TOWER_REASONS = {
    "dinov2": "layer scale",
    "dinov2_with_registers": "layer scale.*register rows",
    "dinov3_vit": "layer scale.*rotary positions",
    "siglip2": "any size and shape",
    "siglip2_vision_model": "any size and shape",
    "internvl": "layer scale",
    "internvl_vision": "layer scale",
    "pixtral": "rotary positions",
    "mlcd_vision_model": "rotary positions",
    "qwen2_vl": "patches that are merged",
    "qwen3_vl_vision": "patches that are merged",
    "vit": "no architecture here describes it",
    "mistral": "no architecture here describes it",
}


def tower_error(folder, fields):
    (folder / "config.json").write_text(json.dumps(fields, default=str))
    with pytest.raises(CheckpointError) as raised:
        vision_config(folder, -1)
    (line,) = str(raised.value).splitlines()
    return line


@pytest.mark.parametrize("model_type", [name for name in TOWER_REASONS if name in CONFIG_MAPPING])
def test_a_tower_is_refused_with_the_reason(tmp_path, model_type):
    line = tower_error(tmp_path, AutoConfig.for_model(model_type).to_dict())
    assert f"model_type is {model_type!r}" in line
    assert re.search(TOWER_REASONS[model_type], line)
    assert line.endswith(", ".join(t for one in vision_towers().values() for t in one.folder_types))


def test_a_tower_of_the_publishers_own_code(tmp_path):
    """InternViT is none of transformers'; AIMv2 was not, before its folders were renewed."""
    intern = {"model_type": "intern_vit_6b", "hidden_size": 1024, "qk_normalization": False}
    assert "layer scale" in tower_error(tmp_path, intern)
    sizes = {"hidden_size": 1024, "image_size": 224, "use_bias": False, "qkv_bias": False}
    old = {"model_type": "aimv2", "architectures": ["AIMv2Model"], **sizes}
    own = "model_type is 'aimv2', and no vision_config is 'aimv2_vision_model'.*own code"
    assert re.search(own, tower_error(tmp_path, old))
    whole = {"model_type": "aimv2", "vision_config": {**sizes, "model_type": "aimv2"}}
    assert re.search(own, tower_error(tmp_path, whole))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"is_native": True}, "is_native is True; it must be False"),
        ({"qkv_bias": True}, "qkv_bias is True; it must be False"),
        ({"mlp_bias": True}, "mlp_bias is True; it must be False"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; it must be one of"),
    ],
    ids=["native", "qkv", "mlp", "activation"],
)
def test_a_setting_of_a_known_tower_is_refused(tmp_path, changes, message):
    fields = AutoConfig.for_model("aimv2_vision_model", **changes).to_dict()
    assert message in tower_error(tmp_path, fields)
    plain = AutoConfig.for_model("aimv2_vision_model", use_head=True).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(plain))
    assert vision_config(tmp_path, -1).kind == "aimv2"  # the head is left out
