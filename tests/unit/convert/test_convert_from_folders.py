"""Published folders alone: sizes are read from them, and whole vision-language models taken apart."""

import json

import pytest
import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralVisionConfig,
)

from dattn_mcore.architectures import vision_towers
from dattn_mcore.config.load import load_config
from dattn_mcore.errors import CheckpointError
from tests.unit.convert.loaded_models import load, pixels, text_ids
from tests.unit.convert.raw_models import (
    hugging_face_features,
    make_llm,
    make_tower,
    randomize,
    raw_config,
    rename,
)
from tools.checkpoint_convert.__main__ import main
from tools.checkpoint_convert.dist_checkpoint import DistCheckpoint
from tools.checkpoint_convert.hf_to_mcore import convert_parts
from tools.checkpoint_convert.raw_folders import same_bits


@pytest.mark.parametrize(
    ("family", "kind"),
    [("gemma3", "siglip"), ("qwen3", "clip"), ("llama", "aimv2"), ("ministral3", "clip")],
)
def test_sizes_are_read_from_the_folders(tmp_path, capsys, family, kind):
    """Without --config: the model's settings are written, and a run of them finds the weights."""
    config = raw_config(family, kind)
    llm = make_llm(tmp_path / "llm", config)
    make_tower(tmp_path / "vision", config)
    mean = {"image_mean": [0.1, 0.2, 0.3]}
    file, fields = {
        "siglip": ("preprocessor_config.json", mean),
        "clip": ("processor_config.json", {"image_processor": mean, "processor_class": "x"}),
        "aimv2": ("processor_config.json", {"image_processor": None}),
    }[kind]
    (tmp_path / "vision" / file).write_text(json.dumps(fields))
    parts = ["--llm", str(tmp_path / "llm"), "--vision", str(tmp_path / "vision")]
    assert main(["hf-to-mcore", *parts, str(tmp_path / "out")]) == 0
    assert "out.yaml: the model's settings" in capsys.readouterr().out
    written = load_config(tmp_path / "out.yaml", ["data.image_policy=stretch"])
    assert written.model.family == family and written.model.vision.kind == kind
    assert written.model.llm.windows == config.model.llm.windows
    own = vision_towers()[kind]  # where no file says it
    assert written.data.image_mean == (own.image_mean if kind == "aimv2" else (0.1, 0.2, 0.3))
    assert written.data.image_std == own.image_std
    assert written.data.tokenizer == str(tmp_path / "llm")
    with torch.no_grad():
        expected = llm(text_ids(config)[None]).logits[0]
    torch.testing.assert_close(load(tmp_path / "out", written)[0], expected, atol=1e-4, rtol=0)
    assert main(["hf-to-mcore", *parts, str(tmp_path / "other"), "--select-layer", "-1"]) == 0
    assert load_config(tmp_path / "other.yaml").model.vision.select_layer == -1


def newer_part(name):
    """The name of a LLaVA's tensor as the modules of transformers 5 are called."""
    for older, newer in (
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ):
        if name.startswith(older):
            return newer + name.removeprefix(older)
    raise AssertionError(name)


LLAVA = LlavaConfig, LlavaForConditionalGeneration
NEXT = LlavaNextConfig, LlavaNextForConditionalGeneration


def make_llava(folder, config, classes):
    """Writes `folder/llava`; its language model, its tower and the whole."""
    llm, tower = make_llm(folder / "llm", config), make_tower(folder / "vision", config)
    sizes = {"text_config": llm.config, "vision_config": tower.config, "image_token_index": 1}
    whole = classes[1](classes[0](**sizes, dtype="float32")).eval()
    randomize(whole.model.multi_modal_projector)
    whole.model.language_model.load_state_dict(llm.model.state_dict())
    whole.lm_head.load_state_dict(llm.lm_head.state_dict())
    whole.model.vision_tower.load_state_dict(tower.state_dict())
    whole.save_pretrained(folder / "llava")
    return llm, tower, whole


@pytest.mark.parametrize(
    ("names", "kind", "classes"),
    [
        ("newer", "clip", LLAVA),
        ("older", "clip", LLAVA),
        ("older", "aimv2", LLAVA),
        ("older", "clip", NEXT),
    ],
    ids=["newer names", "clip", "aimv2", "next"],
)
def test_a_llava_is_taken_apart(tmp_path, names, kind, classes):
    """Its language model, its tower and the two linears of its projector."""
    config = raw_config("llama", kind, -2)
    llm, tower, whole = make_llava(tmp_path, config, classes)
    if names == "newer":
        rename(tmp_path / "llava", newer_part)
    parts = ["--llm", str(tmp_path / "llava"), "--vision", str(tmp_path / "llava")]
    assert main(["hf-to-mcore", *parts, str(tmp_path / "out")]) == 0
    logits, features = load(tmp_path / "out", load_config(tmp_path / "out.yaml"))
    with torch.no_grad():
        expected = llm(text_ids(config)[None]).logits[0]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    wanted = hugging_face_features(tower, config, pixels(config))
    torch.testing.assert_close(features, wanted, atol=1e-4, rtol=0)
    projector = DistCheckpoint(tmp_path / "out").read("projector.mlp.linear_fc1.weight", None)
    assert same_bits(projector, whole.model.multi_modal_projector.linear_1.weight)


def test_a_projector_of_another_width_is_refused(tmp_path):
    """One that is taken in part, or starts anew where it was asked for, would go unseen."""
    config = raw_config("llama", "clip", -2)
    make_llava(tmp_path, config, LLAVA)  # as wide as its language model: 32
    folder = tmp_path / "llava"
    expected = r"linear_1.weight is \[32, 24\], but model.projector.ffn_hidden_size=40 and .*; set"
    with pytest.raises(CheckpointError, match=expected):
        convert_parts(folder, folder, config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_language_model_of_a_gemma3_with_images_is_taken(tmp_path):
    """Its projector is another one, and starts anew."""
    config = raw_config("gemma3", "siglip", -2)
    llm, tower = make_llm(tmp_path / "llm", config), make_tower(tmp_path / "vision", config)
    sizes = {"text_config": llm.config, "vision_config": tower.config, "mm_tokens_per_image": 4}
    whole = Gemma3ForConditionalGeneration(Gemma3Config(**sizes, dtype="float32")).eval()
    whole.model.language_model.load_state_dict(llm.model.state_dict())
    whole.model.vision_tower.load_state_dict(tower.state_dict())
    whole.save_pretrained(tmp_path / "whole")
    parts = ["--llm", str(tmp_path / "whole"), "--vision", str(tmp_path / "whole")]
    assert main(["hf-to-mcore", *parts, str(tmp_path / "out")]) == 0
    logits, _ = load(tmp_path / "out", load_config(tmp_path / "out.yaml"))
    with torch.no_grad():
        expected = llm(text_ids(config)[None]).logits[0]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["mistral", "ministral3"])
def test_the_language_model_of_a_mistral3_with_images_is_taken(tmp_path, capsys, family, tied):
    """Its own tower is of another kind: one is named beside it.

    Whether it has a head follows from the whole model's setting, not from its text's.
    """
    config = raw_config(family, "siglip", -2)
    llm = make_llm(tmp_path / "llm", config)
    make_tower(tmp_path / "vision", config)
    pixtral = PixtralVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    sizes = Mistral3Config(
        text_config=llm.config, vision_config=pixtral, dtype="float32", tie_word_embeddings=tied
    )
    whole = Mistral3ForConditionalGeneration(sizes).eval()
    whole.model.language_model.load_state_dict(llm.model.state_dict())
    if not tied:
        whole.lm_head.load_state_dict(llm.lm_head.state_dict())
    whole.save_pretrained(tmp_path / "whole")
    folder = str(tmp_path / "whole")
    parts = ["--llm", folder, "--vision", str(tmp_path / "vision")]
    assert main(["hf-to-mcore", *parts, str(tmp_path / "out")]) == 0
    written = load_config(tmp_path / "out.yaml")
    assert written.model.llm.tie_embeddings is tied
    logits, _ = load(tmp_path / "out", written)
    with torch.no_grad():
        expected = whole(text_ids(config)[None]).logits[0]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    capsys.readouterr()
    assert main(["hf-to-mcore", "--llm", folder, "--vision", folder, str(tmp_path / "no")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "model_type is 'pixtral'" in line and "rotary positions" in line


def test_quantized_weights_are_refused(tmp_path, capsys):
    """As some models are published, Ministral 3's instruct models among them."""
    config = raw_config("ministral3", "siglip")
    make_llm(tmp_path / "llm", config)
    make_tower(tmp_path / "vision", config)
    file = tmp_path / "llm/config.json"
    fields = json.loads(file.read_text())
    file.write_text(json.dumps({**fields, "quantization_config": {"quant_method": "fp8"}}))
    parts = ["--llm", str(tmp_path / "llm"), "--vision", str(tmp_path / "vision")]
    capsys.readouterr()
    assert main(["hf-to-mcore", *parts, str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "quantized (quantization_config: fp8); give the model's folder in bf16" in line
