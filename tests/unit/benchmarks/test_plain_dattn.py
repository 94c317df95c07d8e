"""The plain D-Attn lines against the float64 oracle of the exported model, and transformers' tower.

The oracle loops over rows and takes one softmax over all visible keys' logits at a time; the plain
lines are matrices. Neither shares code with the other, nor with the trainer.
"""

import ast
from pathlib import Path

import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from benchmarks import plain_dattn, plain_training
from benchmarks.plain_training import draw_weights
from dattn_mcore.architectures.tables import model_table
from dattn_mcore.config.load import from_dict
from tests.unit.hf.hf_reference import reference_logits
from tools.checkpoint_convert.configs import TokenIds, to_hf
from tools.checkpoint_convert.tables import hf_shapes

IMAGE = 31
MODEL = {
    "llm": {
        "num_layers": 2,
        "hidden_size": 16,
        "ffn_hidden_size": 24,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "head_dim": 6,
        "vocab_size": 32,
        "sliding_window": None,
    },
    "vision": {
        "image_size": 8,
        "patch_size": 4,
        "num_layers": 2,
        "hidden_size": 12,
        "ffn_hidden_size": 20,
        "num_attention_heads": 3,
    },
    "projector": {"ffn_hidden_size": 14},
}
SIZES = plain_dattn.Sizes(layers=2, heads=4, head_dim=6, tower_layers=2, tower_heads=3, patch=4)
# One sample each: ids, -1 where an image stands.
SAMPLES = {
    "image first": [-1, 5, 9, 3, 2],
    "text only": [4, 8, 15, 16],
    "interleaved": [1, 7, -1, 11, 12, -1, -1, 13],
    "image last": [6, 10, -1],
}


@pytest.fixture(autouse=True)
def float64():
    """The oracle's angles, which are lists of numbers, are float64 then, too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(scope="module")
def weights():
    """float64, that require gradients; no norm is 1 and no bias 0."""
    table = model_table(from_dict({"model": MODEL}).model)
    drawn = draw_weights(hf_shapes(table), seed=3)
    return {name: w.double().requires_grad_() for name, w in drawn.items()}


def inputs(sample):
    generator = torch.Generator().manual_seed(7)
    images, before = [], 0
    for token in sample:
        if token == -1:
            images.append((before, torch.randn(3, 8, 8, generator=generator).double()))
        before += token != -1
    return torch.tensor([token for token in sample if token != -1]), images


@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)
def test_logits_and_gradients_equal_the_float64_oracle(weights, sample):
    config = from_dict({"model": MODEL})
    hf = to_hf(
        config.model,
        config.attention,
        TokenIds(bos=1, eos=2, pad=0, image=IMAGE, stop=(2,)),
        torch.float64,
    )
    ids, images = inputs(sample)
    rows = [plain_dattn.tower(weights, SIZES, pixels) for _, pixels in images]
    features = torch.stack(rows) if rows else torch.zeros(0, 4, 12).double()
    tokens = [IMAGE if token == -1 else token for token in sample]
    expected = reference_logits(weights, hf, tokens, features)
    actual = plain_dattn.logits(weights, SIZES, ids, images)
    # float64 accumulates a few units of 1e-16 per operation; logits and gradients are about 1.
    torch.testing.assert_close(actual, expected, atol=1e-11, rtol=1e-11)
    assert actual.std() > 0.1
    direction = torch.randn(actual.shape, generator=torch.Generator().manual_seed(9)).double()
    ours, theirs = (
        torch.autograd.grad((logits * direction).sum(), list(weights.values()), allow_unused=True)
        for logits in (actual, expected)
    )
    for name, one, other in zip(weights, ours, theirs, strict=True):
        assert (one is None) == (other is None), name
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10, msg=name)


def test_the_tower_is_siglip(weights):
    vision = MODEL["vision"]
    tower = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=vision["hidden_size"],
            intermediate_size=vision["ffn_hidden_size"],
            num_hidden_layers=vision["num_layers"],
            num_attention_heads=vision["num_attention_heads"],
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            vision_use_head=False,
        )
    ).double()
    prefix = "model.vision_tower."
    own = {name[len(prefix) :]: w for name, w in weights.items() if name.startswith(prefix)}
    tower.load_state_dict({name: w.detach() for name, w in own.items()})
    pixels = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(2)).double()
    with torch.no_grad():
        expected = tower(pixels[None]).last_hidden_state[0]
        actual = plain_dattn.tower(weights, SIZES, pixels)
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("module", [plain_dattn, plain_training])
def test_nothing_of_this_project_is_imported(module):
    tree = ast.parse(Path(module.__file__).read_text("utf-8"))
    names = [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    ]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not [
        name for name in names if name.split(".")[0] in ("dattn_mcore", "tools", "megatron")
    ]
