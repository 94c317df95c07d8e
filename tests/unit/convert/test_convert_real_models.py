"""Hugging Face's own models against the Megatron-Core model that starts from their weights.

Small random models of every family and tower are written by transformers, converted, loaded the
way a run loads `checkpoint.init_from`, and compared: logits and features within 1e-4 in float32,
weights to the last bit.
"""

import functools
import json
from dataclasses import replace

import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralVisionConfig,
)

from dattn_mcore.architectures import language_models, vision_towers
from dattn_mcore.architectures.sizes import RopeConfig
from dattn_mcore.checkpoint.load import load_weights
from dattn_mcore.checkpoint.state import model_state
from dattn_mcore.config.load import load_config, to_yaml
from dattn_mcore.layers.layout import build_seq_params
from dattn_mcore.models.dattn import ModelInputs
from dattn_mcore.parallel.groups import single_process
from dattn_mcore.training.model import build_from_config
from tests.unit.convert.convert_helpers import TRAITS as TRAITS_OF
from tests.unit.convert.convert_helpers import make_tokenizer
from tests.unit.convert.raw_models import (
    LLMS,
    hugging_face_features,
    make_llm,
    make_tower,
    newer_names,
    older_names,
    randomize,
    raw_config,
    rename,
)
from tests.unit.hf.hf_models import TEXT_FEATURES
from tools.checkpoint_convert.__main__ import main
from tools.checkpoint_convert.dist_checkpoint import DistCheckpoint
from tools.checkpoint_convert.hf_to_mcore import convert_parts
from tools.checkpoint_convert.raw_folders import same_bits

CPU = torch.device("cpu")
LENGTH = 21  # text rows; longer than Gemma's small window of 6


def text_ids(config):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, config.model.llm.vocab_size, (LENGTH,), generator=generator)


def text_logits(model, config):
    """Logits of a text-only sample."""
    ids = text_ids(config)
    params = build_seq_params((((False, LENGTH),),), t2v_position="none", multiple=1)
    inputs = ModelInputs(params, ids, torch.full_like(ids, -100), None)
    with torch.no_grad():
        return model.eval()(inputs, return_logits=True)[:, : config.model.llm.vocab_size]


def pixels(config):
    side = config.model.vision.image_size
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(4))


def load(path, config):
    """The checkpoint as a run gets it by checkpoint.init_from; logits and features."""
    with single_process() as groups:
        (model,) = build_from_config(config, groups, CPU)
        load_weights(path, config, [model], groups)
        with torch.no_grad():
            features = model.eval().vision(pixels(config))
        return text_logits(model, config), features


@pytest.mark.parametrize(
    ("family", "kind", "select"),
    [
        ("mistral", "siglip", -1),
        ("gemma2", "siglip", -2),
        ("gemma2", "clip", -1),
        ("gemma3", "siglip", -1),
        ("llama", "clip", -2),
        ("ministral3", "siglip", -1),
        ("qwen2", "siglip", -2),
        ("qwen3", "siglip", -1),
        ("qwen3", "aimv2", -1),
        ("llama", "aimv2", -2),
    ],
)
def test_logits_and_features_equal_hugging_faces(tmp_path, family, kind, select):
    config = raw_config(family, kind, select)
    llm = make_llm(tmp_path / "llm", config)
    tower = make_tower(tmp_path / "vision", config)
    convert_parts(tmp_path / "llm", tmp_path / "vision", config, tmp_path / "out")
    logits, features = load(tmp_path / "out", config)
    with torch.no_grad():
        expected = llm(text_ids(config)[None]).logits[0]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    wanted = hugging_face_features(tower, config, pixels(config))
    torch.testing.assert_close(features, wanted, atol=1e-4, rtol=0)
    assert expected.std() > 0.1 and wanted.std() > 0.1  # all alike would prove nothing


def test_a_windowed_mistral(tmp_path):
    config = raw_config("mistral", "clip", sliding_window=7)
    llm = make_llm(tmp_path / "llm", config)
    make_tower(tmp_path / "vision", config)
    convert_parts(tmp_path / "llm", tmp_path / "vision", config, tmp_path / "out")
    with torch.no_grad():
        expected = llm(text_ids(config)[None]).logits[0]
    torch.testing.assert_close(load(tmp_path / "out", config)[0], expected, atol=1e-4, rtol=0)


_YARN = TRAITS_OF["ministral3"]["rope"]
# What makes each family itself, and what turns it off: a size, or a feature.
OFF = {
    "gemma2": {
        "soft-cap": {"attention_softcap": None},
        "final cap": {"final_softcap": None},
        "window": {"sliding_window": None, "layer_pattern": ()},
        "window on every layer": {"layer_pattern": ()},
        "query scale": {"query_scale": None},
        "post-norms": {"norms": "pre"},
        "zero-centred gamma": {"zero_centered_gamma": False},
        "embedding scale": {"scale_embeddings": False},
        "activation": {"activation": "silu"},
    },
    "gemma3": {
        "window": {"sliding_window": None, "layer_pattern": ()},
        "rotary base of sliding layers": {"sliding_rotary_base": None},
        "linear rope": {"rope": RopeConfig()},
        "norms of heads": {"qk_norm": False},
    },
    "llama": {"llama3 rope": {"rope": RopeConfig()}},
    "ministral3": {
        "yarn": {"rope": RopeConfig()},
        "frequencies": {"rope": replace(_YARN, factor=1.0)},
        "border of fast waves": {"rope": replace(_YARN, beta_fast=5.0)},
        "border of slow waves": {"rope": replace(_YARN, beta_slow=0.2)},
        "whole frequencies": {"rope": replace(_YARN, truncate=True)},
        "attention factor": {"rope": replace(_YARN, attention_factor=1.0)},
        "scale by position": {"rope": replace(_YARN, query_scale_beta=0.0)},
    },
    "qwen2": {"biases": {"qkv_bias": False}},
    "qwen3": {"norms of heads": {"qk_norm": False}},
    "smollm3": {
        "layers without rotary positions": {"rotary_pattern": ()},
        "which layers those are": {"rotary_pattern": (True, False, True)},
    },
}
TRAITS = [(family, off) for family, traits in OFF.items() for off in (None, *traits)]


def test_no_family_is_left_out():
    """`mistral` is a plain decoder: it has nothing to turn off."""
    records = language_models()
    assert set(TRAITS_OF) == set(LLMS) == set(TEXT_FEATURES) == set(records)
    assert set(OFF) == set(records) - {"mistral"}
    for family, features in TEXT_FEATURES.items():
        assert {name: getattr(records[family].features, name) for name in features} == features


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Gives a family's converted model, its configuration and Hugging Face's logits."""

    @functools.cache
    def make(family):
        folder = tmp_path_factory.mktemp(family)
        config = raw_config(family, "siglip")
        llm = make_llm(folder / "llm", config)
        make_tower(folder / "vision", config)
        convert_parts(folder / "llm", folder / "vision", config, folder / "out")
        with torch.no_grad():
            return folder / "out", config, llm(text_ids(config)[None]).logits[0]

    return make


@pytest.mark.parametrize(("family", "off"), TRAITS)
def test_the_comparison_sees_every_trait(converted, family, off, monkeypatch):
    path, config, expected = converted(family)
    changes = OFF[family].get(off, {})
    sizes = {name: value for name, value in changes.items() if hasattr(config.model.llm, name)}
    record = language_models()[family]
    others = {name: value for name, value in changes.items() if name not in sizes}
    features = replace(record.features, **others)
    monkeypatch.setitem(language_models(), family, replace(record, features=features))
    changed = replace(config.model.llm, **sizes)
    config = replace(config, model=replace(config.model, llm=changed))
    with single_process() as groups:
        (model,) = build_from_config(config, groups, CPU)
        state = model_state([model], groups)
        model.load_state_dict(
            dist_checkpointing.load(state, str(path))["model0"],
            strict=False,
        )
        difference = (text_logits(model, config) - expected).abs().max()
    # Far from the bound on both sides, so that no luck decides.
    assert difference < 1e-4 if off is None else difference > 1e-2


def read_folder(folder):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


@pytest.mark.parametrize("names", ["as written", "older", "newer", "whole"])
@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("mistral", "clip"),
        ("gemma2", "siglip"),
        ("qwen2", "siglip"),
        ("gemma3", "clip"),
        ("qwen3", "aimv2"),
        ("ministral3", "siglip"),
    ],
)
def test_there_and_back_is_bitwise(tmp_path, family, kind, names):
    """bf16 language model in shards, float32 tower; then the export holds the same bits."""
    config = raw_config(family, kind)
    config = replace(
        config, data=replace(config.data, tokenizer=str(make_tokenizer(tmp_path)), template="plain")
    )
    make_llm(tmp_path / "llm", config, torch.bfloat16, shard="20KB")
    make_tower(tmp_path / "vision", config, whole=names == "whole")
    if names in ("older", "newer"):
        (older_names if names == "older" else newer_names)(tmp_path / "vision")
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    llm, vision, run = (str(tmp_path / name) for name in ("llm", "vision", "run.yaml"))
    parts = ["--llm", llm, "--vision", vision, "--config", run]
    assert len(list((tmp_path / "llm").glob("*.safetensors"))) > 2
    assert main(["hf-to-mcore", *parts, str(tmp_path / "out")]) == 0
    assert main(["mcore-to-hf", "--no-check", str(tmp_path / "out"), str(tmp_path / "back")]) == 0
    back = read_folder(tmp_path / "back")
    seen = 0
    for name, tensor in read_folder(tmp_path / "llm").items():
        ours = name if name == "lm_head.weight" else name.replace("model.", "model.language_model.")
        assert same_bits(back.pop(ours), tensor), name
        seen += 1
    for name, tensor in read_folder(tmp_path / "vision").items():
        ours = "model.vision_tower." + name.removeprefix("vision_model.")
        if ours in back:
            assert same_bits(back.pop(ours), tensor), name
            seen += 1
    assert seen > 30
    assert all(name.startswith("model.multi_modal_projector.") for name in back)


def test_the_projector_is_the_one_of_a_fresh_run(tmp_path):
    config = raw_config("gemma2", "siglip")
    config = replace(
        config,
        model=replace(
            config.model, projector=replace(config.model.projector, output_norm_init=0.03)
        ),
    )
    make_llm(tmp_path / "llm", config)
    make_tower(tmp_path / "vision", config)
    convert_parts(tmp_path / "llm", tmp_path / "vision", config, tmp_path / "out")
    written = DistCheckpoint(tmp_path / "out")
    with single_process() as groups:
        (model,) = build_from_config(config, groups, CPU)
        fresh = dict(model.named_parameters())
    names = [name for name in fresh if name.startswith("projector.")]
    assert len(names) == 14
    for name in names:
        assert same_bits(written.read(name), fresh[name].detach()), name


def test_a_bf16_run_starts_from_a_float32_tower(tmp_path):
    """Towers are published in float32: the checkpoint keeps their bits, the run rounds them."""
    config = raw_config("gemma2", "siglip")
    config = replace(config, train=replace(config.train, precision="bf16"))
    make_llm(tmp_path / "llm", config, torch.bfloat16)
    make_tower(tmp_path / "vision", config)
    convert_parts(tmp_path / "llm", tmp_path / "vision", config, tmp_path / "out")
    written = DistCheckpoint(tmp_path / "out")
    assert written.dtypes["vision.patch_embedding.weight"] == torch.float32
    assert written.dtypes["embedding.word_embeddings.weight"] == torch.bfloat16
    with single_process() as groups:
        (model,) = build_from_config(config, groups, CPU)
        load_weights(tmp_path / "out", config, [model], groups)
        parameters = {name: p.detach() for name, p in model.named_parameters()}
    for name in ("vision.patch_embedding.weight", "vision.position_embedding.weight"):
        assert same_bits(parameters[name], written.read(name).bfloat16())
    embedding = "embedding.word_embeddings.weight"
    assert same_bits(parameters[embedding], written.read(embedding))
    for name, parameter in parameters.items():
        wide = "_position.fc" in name
        assert parameter.dtype == (torch.float32 if wide else torch.bfloat16), name


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


@pytest.mark.parametrize(
    ("names", "kind"), [("newer", "clip"), ("older", "clip"), ("older", "aimv2")]
)
def test_a_llava_is_taken_apart(tmp_path, names, kind):
    """Its language model, its tower and the two linears of its projector."""
    config = raw_config("llama", kind, -2)
    llm, tower = make_llm(tmp_path / "llm", config), make_tower(tmp_path / "vision", config)
    sizes = {"text_config": llm.config, "vision_config": tower.config, "image_token_index": 1}
    whole = LlavaForConditionalGeneration(LlavaConfig(**sizes, dtype="float32")).eval()
    randomize(whole.model.multi_modal_projector)
    whole.model.language_model.load_state_dict(llm.model.state_dict())
    whole.lm_head.load_state_dict(llm.lm_head.state_dict())
    whole.model.vision_tower.load_state_dict(tower.state_dict())
    whole.save_pretrained(tmp_path / "llava")
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
