"""mcore -> hf -> mcore -> hf: keys, bits, and what the exported model computes."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from dattn_mcore.architectures.tables import model_table
from dattn_mcore.data.tokenizer import CHAT_SYMBOLS
from dattn_mcore.hf import DattnForConditionalGeneration
from tests.unit.convert.convert_helpers import make_checkpoint, make_tokenizer, small_config
from tools.checkpoint_convert import hf_to_mcore, mcore_to_hf
from tools.checkpoint_convert.dist_checkpoint import DistCheckpoint
from tools.checkpoint_convert.mcore_to_hf import ExportOptions
from tools.checkpoint_convert.tables import hf_shapes

CASES = [
    ("mistral", "siglip", {}),
    ("gemma2", "clip", {}),
    ("mistral", "clip", {"visual_positions": False}),
    ("gemma2", "siglip", {"visual_positions": False}),
    ("gemma3", "siglip", {}),
    ("llama", "siglip", {}),
    ("qwen2", "clip", {}),
    ("qwen3", "siglip", {}),
    ("qwen3", "aimv2", {}),
    ("mistral", "aimv2", {"visual_positions": False}),
    ("ministral3", "siglip", {}),
    ("smollm3", "clip", {}),
    ("olmo2", "siglip", {}),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), CHAT_SYMBOLS)


def read_folder(folder):
    """All tensors of an exported folder."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


@pytest.mark.parametrize(("family", "kind", "model"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bitwise(tmp_path, tokenizer, family, kind, model, dtype):
    """Both ways and back: the same bits; padded vocabulary rows leave as nothing, return as 0."""
    config = small_config(tokenizer, family, kind, **model)
    if kind == "clip":
        views = {"image_policy": "anyres_letterbox", "anyres_grids": ((2, 1), (1, 3))}
        config = replace(config, data=replace(config.data, **views))
    original = make_checkpoint(tmp_path / "a", config, dtype)
    mcore_to_hf.convert(tmp_path / "a", tmp_path / "hf", ExportOptions(max_shard_bytes=20_000))
    hf_to_mcore.convert(tmp_path / "hf", tmp_path / "b")
    mcore_to_hf.convert(tmp_path / "b", tmp_path / "hf2", ExportOptions(template=None))

    back = DistCheckpoint(tmp_path / "b")
    assert back.config.model == config.model
    assert back.config.attention == config.attention
    for name in ("image_mean", "image_std", "image_policy", "anyres_grids"):
        assert getattr(back.config.data, name) == getattr(config.data, name), name
    first, second = ((tmp_path / x / "processor_config.json").read_text() for x in ("hf", "hf2"))
    assert first == second
    for (key, layer), tensor in original.items():
        found = back.read(key, layer)
        rows = config.model.llm.vocab_size
        if key in ("embedding.word_embeddings.weight", "output_layer.weight"):
            assert found.shape == tensor.shape and not found[rows:].any()
            tensor, found = tensor[:rows], found[:rows]
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), key
    first, second = read_folder(tmp_path / "hf"), read_folder(tmp_path / "hf2")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("family", "kind", "model"), CASES)
def test_export_holds_exactly_the_models_parameters(tmp_path, tokenizer, family, kind, model):
    """from_pretrained finds every tensor, none is left over, and tied weights stay tied."""
    config = small_config(tokenizer, family, kind, **model)
    make_checkpoint(tmp_path / "a", config)
    mcore_to_hf.convert(tmp_path / "a", tmp_path / "hf")
    loaded, report = DattnForConditionalGeneration.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    weights = read_folder(tmp_path / "hf")
    assert set(weights) == set(hf_shapes(model_table(config.model)))
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())
    tied = loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert tied == config.model.llm.tie_embeddings
    assert loaded.lm_head.weight.shape[0] == config.model.llm.vocab_size
    if not config.model.visual_positions:
        assert not loaded.model.vision_tower.embeddings.position_embedding.weight.any()


def test_layouts_of_the_joined_tensors(tmp_path, tokenizer):
    """q, k, v and gate, up stand in the Megatron-Core tensors as the layer reads them."""
    config = small_config(tokenizer)
    tensors = make_checkpoint(tmp_path / "a", config)
    mcore_to_hf.convert(tmp_path / "a", tmp_path / "hf")
    weights = read_folder(tmp_path / "hf")
    text = "model.language_model.layers.1."
    kv = tensors["decoder.layers.self_attention.linear_kv.weight", 1]
    k, v = (weights[text + f"self_attn.{x}_proj.weight"] for x in "kv")
    assert torch.equal(kv[:8], k[:8]) and torch.equal(kv[8:16], v[:8])  # group 0
    assert torch.equal(kv[16:24], k[8:]) and torch.equal(kv[24:], v[8:])  # group 1
    fc1 = tensors["decoder.layers.mlp.linear_fc1.weight", 1]
    assert torch.equal(fc1[:48], weights[text + "mlp.gate_proj.weight"])
    assert torch.equal(fc1[48:], weights[text + "mlp.up_proj.weight"])
    qkv = tensors["vision.decoder.layers.self_attention.linear_qkv.weight", 2]
    q = weights["model.vision_tower.encoder.layers.2.self_attn.q_proj.weight"]
    assert torch.equal(qkv[:12], q[:12]) and torch.equal(qkv[36:48], q[12:])  # heads 0 and 1


def test_shards_and_index(tmp_path, tokenizer):
    """Files stay under the limit, and the index is what transformers expects."""
    make_checkpoint(tmp_path / "a", small_config(tokenizer))
    mcore_to_hf.convert(tmp_path / "a", tmp_path / "hf", ExportOptions(max_shard_bytes=60_000))
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 2
    assert {file.name for file in files} == set(index["weight_map"].values())
    assert all(file.stat().st_size < 70_000 for file in files)
    assert set(index["weight_map"]) == set(read_folder(tmp_path / "hf"))


def test_bfloat16_export_keeps_positions_in_float32(tmp_path, tokenizer):
    """Row and column positions are computed and stored in float32, also where all else is bf16."""
    make_checkpoint(tmp_path / "a", small_config(tokenizer, "gemma2"), torch.bfloat16)
    mcore_to_hf.convert(tmp_path / "a", tmp_path / "hf")
    weights = read_folder(tmp_path / "hf")
    loaded = DattnForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype="auto")
    for name, parameter in loaded.named_parameters():
        wide = "row_position" in name or "column_position" in name
        assert parameter.dtype == (torch.float32 if wide else torch.bfloat16), name
        assert torch.equal(parameter, weights[name]), name
