"""Folders that were exported before load with the code as it is; missing weights are reported."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from dattn_mcore.hf import AUTO_MAP, TESTED_TRANSFORMERS, DattnConfig, register
from tests.unit.hf.hf_models import (
    TEXT_FEATURES,
    VISION_FEATURES,
    layer_norms,
    make_model,
    text_config,
)
from tests.unit.hf.test_hf_generate import batch

register()
# config.json of a folder written under transformers 5.23, without what is transformers' own.
OLD_CONFIG = {
    "architectures": ["DattnForConditionalGeneration"],
    "auto_map": {"AutoConfig": "configuration_dattn.DattnConfig"},
    "bos_token_id": 1,
    "dtype": "float32",
    "eos_token_id": 2,
    "image_token_id": 49,
    "merge": "alpha",
    "model_type": "dattn",
    "pad_token_id": 0,
    "projector_hidden_size": 40,
    "projector_norm_eps": 1e-06,
    "projector_output_norm_init": 1.0,
    "t2v_position": "none",
    "text_config": {
        "attention_bias": False,
        "attn_logit_softcapping": 2.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "final_logit_softcapping": 5.0,
        "head_dim": 8,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 32,
        "intermediate_size": 48,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "max_position_embeddings": 8192,
        "model_type": "gemma2",
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 16,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
        "sliding_window": 6,
        "tie_word_embeddings": True,
        "use_bidirectional_attention": None,
        "use_cache": True,
        "vocab_size": 50,
    },
    "text_features": TEXT_FEATURES["gemma2"],
    "tie_word_embeddings": True,
    "transformers_version": "5.23.0",
    "v2v": "diagonal",
    "vision_features": VISION_FEATURES["siglip"],
    "vision_config": {
        "attention_dropout": 0.0,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 24,
        "image_size": 12,
        "intermediate_size": 40,
        "layer_norm_eps": 1e-06,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 2,
        "num_channels": 3,
        "num_hidden_layers": 2,
        "patch_size": 4,
        "vision_use_head": False,
    },
    "vision_feature_layer": -1,
    "visual_positions": True,
}


def layer_names(prefix, parts):
    return {f"{prefix}.{part}" for part in parts}


def expected_names(family, kind, feature_layer):
    """The names under which exported folders hold their weights, written out."""
    names = {"lm_head.weight", "model.language_model.embed_tokens.weight"}
    names.add("model.language_model.norm.weight")
    norms = ["input_layernorm", "post_attention_layernorm"]
    if family == "gemma2":
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    parts = [f"{norm}.weight" for norm in norms]
    parts += [f"self_attn.{p}_proj.weight" for p in "qkvo"]
    parts += [f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")]
    for layer in range(3):
        names |= layer_names(f"model.language_model.layers.{layer}", parts)
    linears = ["linear_1", "linear_2"]
    linears += [f"{axis}_position.fc{i}" for axis in ("row", "column") for i in (1, 2)]
    both = ("weight", "bias")
    parts = [f"{linear}.{p}" for linear in linears for p in both]
    names |= layer_names(
        "model.multi_modal_projector", [*parts, "norm.weight", "output_norm.weight"]
    )
    return names | expected_tower_names("model.vision_tower", kind, feature_layer)


def expected_tower_names(tower, kind, feature_layer):
    both = ("weight", "bias")
    if kind == "aimv2":
        names = {f"{tower}.embeddings.{p}.weight" for p in ("rms_norm", "position_embedding")}
        names |= layer_names(f"{tower}.embeddings.patch_embed", both)
        if feature_layer == -1:
            names.add(f"{tower}.rms_norm.weight")
        modules = ["rms_norm1", "rms_norm2"]
        modules += [f"ffn.{p}_proj" for p in ("gate", "up", "down")]
        modules += [f"attention.{p}" for p in ("q_proj", "k_proj", "v_proj", "out_proj")]
        for layer in range(2 + feature_layer + 1):
            parts = [f"{module}.weight" for module in modules]
            names |= layer_names(f"{tower}.encoder.layers.{layer}", parts)
        return names
    names = layer_names(
        f"{tower}.embeddings", ["patch_embedding.weight", "position_embedding.weight"]
    )
    if kind == "clip":
        names |= layer_names(f"{tower}.pre_layrnorm", both)
        names.add(f"{tower}.embeddings.class_embedding")
    else:
        names.add(f"{tower}.embeddings.patch_embedding.bias")
        if feature_layer == -1:
            names |= layer_names(f"{tower}.post_layernorm", both)
    modules = ["layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"]
    modules += [f"self_attn.{p}" for p in ("q_proj", "k_proj", "v_proj", "out_proj")]
    parts = [f"{module}.{p}" for module in modules for p in both]
    for layer in range(2 + feature_layer + 1):
        names |= layer_names(f"{tower}.encoder.layers.{layer}", parts)
    return names


@pytest.mark.parametrize("feature_layer", [-1, -2])
@pytest.mark.parametrize("kind", VISION_FEATURES)
@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_names_of_weights(family, kind, feature_layer):
    """Whatever transformers calls the parts of its towers, folders hold these."""
    model = make_model(family, kind, vision_feature_layer=feature_layer)
    assert set(model.state_dict()) == expected_names(family, kind, feature_layer)


def logits(model):
    with torch.no_grad():
        return model.eval()(**batch()).logits


@pytest.fixture
def folder(tmp_path):
    """A folder of before: its configuration as it was written, the weights by their names."""
    model = make_model("gemma2")
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(OLD_CONFIG))
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_old_folder_loads(folder, dtype):
    expected = logits(make_model("gemma2"))
    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
        found = logits(auto.from_pretrained(folder, dtype=dtype))
        if dtype == torch.float32:
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
        else:
            assert (found.float() - expected).abs().max() < 0.35 * expected.abs().max()


def test_the_model_without_its_head_loads(folder):
    """What `AutoModel` gives: the hidden states under the logits."""
    found = AutoModel.from_pretrained(folder).eval()
    assert type(found).__name__ == "DattnModel" and "AutoModel" in AUTO_MAP
    whole = make_model("gemma2").eval()
    with torch.no_grad():
        states = found(**batch())
        expected = whole(**batch(), output_hidden_states=True).hidden_states
    torch.testing.assert_close(states[-1], expected[-1], atol=2e-5, rtol=0)


def test_a_folder_that_names_no_features_says_how_to_renew_it(folder):
    without = {name: value for name, value in OLD_CONFIG.items() if "features" not in name}
    (folder / "config.json").write_text(json.dumps(without))
    with pytest.raises(ValueError, match="text_features are missing.*checkpoint_convert refresh"):
        AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norms": "sandwich"}, "text_features.norms is 'sandwich'.*checkpoint_convert refresh"),
        ({"norms": {"mlp_input": "a_layernorm"}}, "it must give attention_input, .* a name each"),
        ({"norms": layer_norms("forward")}, "ends in layernorm"),
        ({"norms": layer_norms("a_layernorm", "a_layernorm")}, "a name each"),
        ({"qk_norm": True}, "text_features.qk_norm is True; it must be a list of heads and head_d"),
        ({"qk_norm": ["rows"]}, "must be a list of heads and head_dim, or empty"),
    ],
)
def test_features_of_another_form_are_refused(changes, message):
    text_features = TEXT_FEATURES["mistral"] | changes
    with pytest.raises(ValueError, match=message):
        DattnConfig(text_config=text_config("mistral"), text_features=text_features)


def test_further_fields_of_a_configuration_are_kept(folder):
    """A later export may record more than this code knows."""
    more = {**OLD_CONFIG, "exported_with": {"transformers": "5.24.0"}, "tested": ["5.6", "5.24"]}
    (folder / "config.json").write_text(json.dumps(more))
    config = AutoConfig.from_pretrained(folder)
    assert config.exported_with == more["exported_with"] and config.tested == more["tested"]
    config.save_pretrained(folder / "again")
    again = json.loads((folder / "again" / "config.json").read_text())
    assert again["exported_with"] == more["exported_with"]
    assert DattnConfig(some_record="x").some_record == "x"
    assert logits(AutoModelForImageTextToText.from_pretrained(folder)).isfinite().all()


def test_missing_weights_are_refused(folder):
    """transformers leaves them at random values, and says so in a log at most."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    lost = "model.vision_tower.encoder.layers.0.mlp.fc1.weight"
    tensors[lost.replace("fc1", "first")] = tensors.pop(lost)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"1 weights are missing \({lost}") as caught:
        AutoModelForImageTextToText.from_pretrained(folder)
    assert "\n" not in str(caught.value) and TESTED_TRANSFORMERS[1] in str(caught.value)
    _, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert set(info["missing_keys"]) == {lost}


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_a_fresh_model_starts_as_it_should(family):
    """Norms at one, whatever the form they are kept in; the last one where the settings say."""
    config = make_model(family, projector_output_norm_init=0.03).config
    model = AutoModelForImageTextToText.from_config(config)
    start = 0.0 if family == "gemma2" else 1.0
    for name, parameter in model.named_parameters():
        if "language_model" in name and "norm" in name:
            assert (parameter == start).all(), name
    projector = model.model.multi_modal_projector
    assert (projector.norm.weight == 1).all() and (projector.output_norm.weight == 0.03).all()


def test_the_towers_configuration_is_left_as_it_was():
    """The tower of fewer layers has a configuration of its own."""
    model = make_model(vision_feature_layer=-2)
    assert model.config.vision_config.num_hidden_layers == 2
    assert len(model.model.vision_tower.encoder.layers) == model.config.num_vision_layers == 1


def test_a_tower_of_another_build_is_refused(monkeypatch):
    """Its last norm must be known, to be left out."""
    from dattn_mcore.hf import visual_dattn

    class Tower(torch.nn.Module):
        def __init__(self, config):
            super().__init__()

    build = SimpleNamespace(from_config=lambda config, dtype: Tower(config))
    monkeypatch.setattr(visual_dattn, "AutoModel", build)
    with pytest.raises(RuntimeError, match="Tower has no post_layernorm.*tested with"):
        make_model(kind="clip")
    with pytest.raises(RuntimeError, match="Tower has no rms_norm.*tested with"):
        make_model(kind="aimv2", vision_feature_layer=-2)
