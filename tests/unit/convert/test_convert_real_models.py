"""Hugging Face's own models against the Megatron-Core model that starts from their weights.

Small random models of every family and tower are written by transformers, converted, loaded the
way a run loads `checkpoint.init_from`, and compared: logits and features within 1e-4 in float32,
weights to the last bit.
"""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from dattn_mcore.checkpoint.load import load_weights
from dattn_mcore.config.load import to_yaml
from dattn_mcore.parallel.groups import single_process
from dattn_mcore.training.model import build_from_config
from tests.unit.convert.convert_helpers import make_tokenizer
from tests.unit.convert.loaded_models import CPU, load, pixels, text_ids
from tests.unit.convert.raw_models import (
    hugging_face_features,
    make_llm,
    make_tower,
    newer_names,
    older_names,
    raw_config,
)
from tools.checkpoint_convert.__main__ import main
from tools.checkpoint_convert.dist_checkpoint import DistCheckpoint
from tools.checkpoint_convert.hf_to_mcore import convert_parts
from tools.checkpoint_convert.raw_folders import same_bits


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
