"""Hugging Face's own models against the Megatron-Core model that starts from their weights.

Small random Mistral, Gemma 2, SigLIP and CLIP are written by transformers, converted, loaded the
way a run loads `checkpoint.init_from`, and compared: logits and features within 1e-4 in float32,
weights to the last bit.
"""

import json
from dataclasses import replace

import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file

from dattn_mcore.checkpoint.load import load_weights
from dattn_mcore.checkpoint.state import model_state
from dattn_mcore.config.load import to_yaml
from dattn_mcore.layers.layout import build_seq_params
from dattn_mcore.models.build import build_model
from dattn_mcore.models.dattn import ModelInputs
from dattn_mcore.parallel import single_process
from tests.unit.convert.convert_helpers import make_tokenizer
from tests.unit.convert.raw_models import (
    hugging_face_features,
    make_llm,
    make_tower,
    newer_names,
    older_names,
    raw_config,
    rename,
)
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
        (model,) = build_model(config, groups, CPU)
        load_weights(path, config, [model], groups)
        with torch.no_grad():
            features = model.eval().vision(pixels(config))
        return text_logits(model, config), features


@pytest.mark.parametrize(
    ("family", "kind", "select"),
    [("mistral", "siglip", -1), ("gemma2", "siglip", -2), ("gemma2", "clip", -1)],
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


# What makes Gemma 2 itself, and the setting that turns it off.
GEMMA_OFF = {
    "soft-cap": {"attention_softcap": None},
    "final cap": {"final_softcap": None},
    "window": {"sliding_window": None},
    "window on every layer": {"sliding_window_every": 1},
    "query scale": {"query_scale": None},
    "post-norms": {"post_norms": False},
    "zero-centred gamma": {"zero_centered_gamma": False},
    "embedding scale": {"scale_embeddings": False},
}


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """A converted Gemma 2 and Hugging Face's logits."""
    folder = tmp_path_factory.mktemp("gemma")
    config = raw_config("gemma2", "siglip")
    llm = make_llm(folder / "llm", config)
    make_tower(folder / "vision", config)
    convert_parts(folder / "llm", folder / "vision", config, folder / "out")
    with torch.no_grad():
        return folder / "out", config, llm(text_ids(config)[None]).logits[0]


@pytest.mark.parametrize("off", [None, *GEMMA_OFF])
def test_the_comparison_sees_every_trait_of_gemma2(gemma, off):
    path, config, expected = gemma
    changed = replace(config.model.llm, **GEMMA_OFF.get(off, {}))
    config = replace(config, model=replace(config.model, llm=changed))
    with single_process() as groups:
        (model,) = build_model(config, groups, CPU)
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
@pytest.mark.parametrize(("family", "kind"), [("mistral", "clip"), ("gemma2", "siglip")])
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
    assert main(["mcore-to-hf", str(tmp_path / "out"), str(tmp_path / "back")]) == 0
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
        (model,) = build_model(config, groups, CPU)
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
        (model,) = build_model(config, groups, CPU)
        load_weights(tmp_path / "out", config, [model], groups)
        parameters = {name: p.detach() for name, p in model.named_parameters()}
    for name in ("vision.patch_embedding.weight", "vision.position_embedding.weight"):
        assert same_bits(parameters[name], written.read(name).bfloat16())
    embedding = "embedding.word_embeddings.weight"
    assert same_bits(parameters[embedding], written.read(embedding))
    for name, parameter in parameters.items():
        wide = "_position.fc" in name
        assert parameter.dtype == (torch.float32 if wide else torch.bfloat16), name


def fails(capsys, *arguments):
    assert main([str(a) for a in arguments]) == 2
    (error,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    return error


@pytest.fixture
def parts(tmp_path):
    """Folders and configuration of a small Gemma 2 with SigLIP, and the arguments."""
    config = raw_config("gemma2", "siglip")
    make_llm(tmp_path / "llm", config)
    make_tower(tmp_path / "vision", config)
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    names = (("--llm", "llm"), ("--vision", "vision"), ("--config", "run.yaml"))
    return [str(x) for flag, name in names for x in (flag, tmp_path / name)]


def test_every_tensor_that_does_not_fit_is_named_at_once(tmp_path, capsys, parts):
    from safetensors.torch import save_file

    file = tmp_path / "llm/model.safetensors"
    weights = load_file(file)
    weights.pop("model.norm.weight")
    weights["stranger"] = torch.ones(3)
    weights["model.layers.0.mlp.up_proj.weight"] = torch.ones(2, 2)
    name = "model.layers.1.self_attn.q_proj.weight"
    weights[name] = weights[name].to(torch.bfloat16)
    weights["model.layers.2.input_layernorm.weight"] = torch.ones(32, dtype=torch.int32)
    save_file(weights, file, metadata={"format": "pt"})
    error = fails(capsys, "hf-to-mcore", *parts, tmp_path / "out")
    start = "model.language_model."
    assert "5 tensors" in error and f"missing {start}norm.weight" in error
    assert "extra stranger" in error
    assert f"{start}layers.0.mlp.up_proj.weight is [2, 2] instead of [48, 32]" in error
    assert "q_proj.weight is bfloat16 instead of float32" in error
    assert "layers.2.input_layernorm.weight is int32 instead of float32" in error
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".out*"))


def test_another_models_folders(tmp_path, capsys, parts):
    """Every setting that differs is named; so is another architecture."""
    other = raw_config("gemma2", "siglip", query_scale=8.0, num_query_groups=4)
    other = replace(other, data=replace(other.data, image_mean=(0.1, 0.2, 0.3)))
    (tmp_path / "run.yaml").write_text(to_yaml(other))
    pixels_of = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    (tmp_path / "vision/preprocessor_config.json").write_text(json.dumps(pixels_of))
    error = fails(capsys, "hf-to-mcore", *parts, tmp_path / "out")
    assert "model.llm.query_scale is 24.0" in error and "and 8.0" in error
    assert "model.llm.num_query_groups is 2" in error
    assert "data.image_mean is [0.5, 0.5, 0.5]" in error
    swapped = [parts[0], parts[3], parts[2], parts[1], *parts[4:]]
    assert "'siglip_vision_model'; a language model must be" in fails(
        capsys, "hf-to-mcore", *swapped, tmp_path / "out"
    )
    assert not list(tmp_path.glob("*out*"))


def test_bad_folders(tmp_path, capsys, parts):
    """A missing shard, a pickle, an index that leads outside, a head that is not tied."""
    out = tmp_path / "out"
    file = tmp_path / "llm/model.safetensors"
    rename(tmp_path / "llm", lambda name: name)  # as a plain file
    weights = load_file(file)
    from safetensors.torch import save_file

    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}, file)
    assert main(["hf-to-mcore", *parts, str(tmp_path / "tied")]) == 0
    save_file({**weights, "lm_head.weight": weights["model.embed_tokens.weight"] + 1}, file)
    assert "differs from model.embed_tokens" in fails(capsys, "hf-to-mcore", *parts, out)
    file.rename(tmp_path / "llm/pytorch_model.bin")
    assert "only safetensors are read" in fails(capsys, "hf-to-mcore", *parts, out)
    index = tmp_path / "llm/model.safetensors.index.json"
    for place, message in (("../x.safetensors", "own folder"), ("x.safetensors", "is missing")):
        index.write_text(json.dumps({"weight_map": {"lm_head.weight": place}}))
        assert message in fails(capsys, "hf-to-mcore", *parts, out)
    assert "together" in fails(capsys, "hf-to-mcore", *parts[:4], out)
    assert "together" in fails(capsys, "hf-to-mcore", *parts, "folder", out)
    assert not list(tmp_path.glob("out*")) and not list(tmp_path.glob(".out*"))


def test_an_interrupted_conversion_leaves_nothing(tmp_path, parts):
    config = raw_config("gemma2", "siglip")

    def interrupt(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_parts(parts[1], parts[3], config, tmp_path / "out", interrupt)
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".out*"))


def test_what_cannot_be_written_is_an_error(tmp_path, parts, monkeypatch, capsys):
    """A full disk, and a source that goes bad midway: one line, nothing left, either way round."""
    from tools.checkpoint_convert import safetensors_folder, streaming

    full = OSError(28, "No space left on device")
    for owner, name in (
        (streaming._HashingStream, "write"),
        (safetensors_folder.SafetensorsFolder, "read"),
    ):
        with monkeypatch.context() as patch:
            original, calls = getattr(owner, name), []

            def fails_late(*args, original=original, calls=calls):
                calls.append(0)
                if len(calls) > 20:
                    raise full
                return original(*args)

            patch.setattr(owner, name, fails_late)
            assert "No space left" in fails(capsys, "hf-to-mcore", *parts, tmp_path / "out")
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".out*"))


def test_an_altered_checkpoint_is_found(tmp_path, parts, capsys):
    """One bit of a weight differs: the export is written beside the check, and does not appear."""
    assert main(["hf-to-mcore", *parts, str(tmp_path / "out")]) == 0
    (file,) = (tmp_path / "out").glob("*.distcp")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    tokenizer = str(make_tokenizer(tmp_path))
    arguments = (tmp_path / "out", tmp_path / "back", "--tokenizer", tokenizer)
    assert "altered" in fails(capsys, "mcore-to-hf", *arguments, "--template", "plain")
    assert not list(tmp_path.glob("*back*")) and not list(tmp_path.glob(".back*"))


def test_published_configurations_are_understood(tmp_path):
    """config.json as Mistral AI, Google and OpenAI publish them, against the shipped files."""
    from pathlib import Path

    from dattn_mcore.config.load import load_config
    from tools.checkpoint_convert.raw_folders import check_fits

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
