"""Converted checkpoints in every layout, against Hugging Face's own models.

A checkpoint is converted once and loaded at tp 2, pp 2 and tp 2 x pp 2, as a run loads
`checkpoint.init_from`; saved again at tp 2 x pp 2, it gives Hugging Face the same bits back.
"""

from dataclasses import replace

import pytest
import torch

from dattn_mcore.architectures import language_models, vision_towers
from dattn_mcore.config.load import from_dict, merge, to_dict
from tests.distributed.model_jobs import load_and_save, model_outputs
from tests.unit.convert.convert_helpers import make_tokenizer
from tests.unit.convert.raw_models import (
    hugging_face_features,
    make_llm,
    make_tower,
    raw_config,
)
from tools.checkpoint_convert.hf_to_mcore import convert_parts
from tools.checkpoint_convert.mcore_to_hf import convert as export
from tools.checkpoint_convert.verify import verify

LENGTH = 16
# Every family once. SigLIP and AIMv2 with all layers and their last norm, CLIP without its last layer.
MODELS = [
    ("mistral", "clip", -2),
    ("gemma2", "siglip", -1),
    ("qwen3", "aimv2", -1),
    ("gemma3", "clip", -2),
    ("llama", "siglip", -1),
    ("ministral3", "siglip", -1),
    ("qwen2", "clip", -2),
    ("smollm3", "aimv2", -1),
    ("olmo2", "siglip", -1),
]


def test_every_family_and_tower_is_here():
    assert {family for family, *_ in MODELS} == set(language_models())
    assert {kind for _, kind, _ in MODELS} == set(vision_towers())


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: "-".join(model[:2]))
def converted(request, tmp_path_factory):
    """Folder of a converted checkpoint, its configuration, and Hugging Face's models."""
    folder = tmp_path_factory.mktemp("converted")
    config = raw_config(*request.param, num_layers=4)
    data = replace(config.data, tokenizer=str(make_tokenizer(folder)), template="plain")
    config = replace(config, data=data)
    llm, tower = make_llm(folder / "llm", config), make_tower(folder / "vision", config)
    convert_parts(folder / "llm", folder / "vision", config, folder / "mcore")
    return folder, to_dict(config), llm, tower


@pytest.mark.parametrize(
    "parallel",
    [{"tp": 2}, {"tp": 2, "sp": True}, {"pp": 2}, {"tp": 2, "pp": 2, "sp": True}],
    ids=["tp2", "tp2-sp", "pp2", "tp2-pp2-sp"],
)
def test_logits_and_features_equal_hugging_faces(pool, converted, parallel):
    folder, tree, llm, tower = converted
    tree = merge(tree, {"parallel": parallel})
    world = parallel.get("tp", 1) * parallel.get("pp", 1)
    layouts = (((False, LENGTH),),)
    *_, result = pool.run(
        model_outputs, world, tree, layouts, None, str(folder / "mcore"), [2, 3, 28, 28]
    )
    vocab = tree["model"]["llm"]["vocab_size"]
    with torch.no_grad():
        expected = llm(result["text_ids"][None, :LENGTH]).logits[0]
    features = hugging_face_features(tower, from_dict(tree), result["pixels"])
    torch.testing.assert_close(result["logits"][:LENGTH, :vocab], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(result["features"], features, atol=1e-4, rtol=0)
    assert expected.std() > 0.1 and features.std() > 0.1


def test_there_and_back_through_tp2_and_pp2_is_bitwise(pool, converted):
    folder, tree, *_ = converted
    tree = merge(tree, {"parallel": {"tp": 2, "pp": 2}})
    saved = folder / "runs/step_00000001"
    pool.run(load_and_save, 4, tree, str(folder / "mcore"), str(saved))
    export(saved, folder / "hf")
    for other in (folder / "llm", folder / "vision", folder / "mcore", saved):
        found = verify(other, folder / "hf")
        assert found.differences == [] and found.tensors > 30
