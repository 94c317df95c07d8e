"""Norm, MLP, rotary positions and embedding give the bits of transformers' own."""

import pytest
import torch
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import ChannelDimension
from transformers.models.gemma2 import modeling_gemma2 as gemma2
from transformers.models.llama import modeling_llama as llama
from transformers.models.ministral3 import modeling_ministral3 as ministral3
from transformers.models.mistral import modeling_mistral as mistral

from dattn_mcore.hf.image_processing_dattn import inner_size
from dattn_mcore.hf.image_rules_dattn import best_grid
from dattn_mcore.hf.layers_dattn import (
    DattnEmbedding,
    DattnMLP,
    DattnRMSNorm,
    DattnRotary,
    repeat_heads,
    rotate,
    rotate_queries,
)
from tests.unit.hf.hf_models import text_config

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FAMILIES = ["mistral", "gemma2"]
ACTIVATIONS = {"mistral": "silu", "gemma2": "gelu_tanh"}


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_weights(ours, theirs, dtype):
    """Both in `dtype` with the same random weights."""
    for i, parameter in enumerate(ours.parameters()):
        parameter.data = noise(*parameter.shape, seed=i) * 0.3
    theirs.load_state_dict(ours.state_dict())
    return ours.to(dtype), theirs.to(dtype)


def rotary_of(text):
    """Rotary positions of a model whose layers have one kind."""
    return DattnRotary(text.head_dim, text.rope_parameters)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_norm(family, dtype):
    theirs = (gemma2.Gemma2RMSNorm if family == "gemma2" else mistral.MistralRMSNorm)(48, eps=1e-5)
    ours = DattnRMSNorm(48, 1e-5, zero_centred=family == "gemma2")
    assert torch.equal(ours.weight, theirs.weight)
    ours, theirs = same_weights(ours, theirs, dtype)
    x = noise(3, 7, 48, dtype=dtype) * 4
    assert torch.equal(ours(x), theirs(x))
    assert ours(x).dtype == theirs(x).dtype


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_mlp(family, dtype):
    text = text_config(family)
    theirs = (gemma2.Gemma2MLP if family == "gemma2" else mistral.MistralMLP)(text)
    ours, theirs = same_weights(DattnMLP(text, ACTIVATIONS[family]), theirs, dtype)
    x = noise(3, 7, 32, dtype=dtype) * 4
    assert torch.equal(ours(x), theirs(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("theta", [100.0, 10000.0, 1e6])
@pytest.mark.parametrize("family", FAMILIES)
def test_rotary(family, theta, dtype):
    text = text_config(
        family, head_dim=128, rope_parameters={"rope_type": "default", "rope_theta": theta}
    )
    stock = gemma2.Gemma2RotaryEmbedding if family == "gemma2" else mistral.MistralRotaryEmbedding
    apply = gemma2.apply_rotary_pos_emb if family == "gemma2" else mistral.apply_rotary_pos_emb
    position = torch.randint(0, 30000, (2, 9), generator=torch.Generator().manual_seed(1))
    query, key = noise(2, 4, 9, 128, dtype=dtype), noise(2, 2, 9, 128, seed=1, dtype=dtype)
    expected = stock(text)(query, position)
    found = rotary_of(text)(position, dtype)
    assert found.query_scale is None
    for ours, theirs in zip(found[:2], expected, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(
        (rotate(query, found), rotate(key, found)), apply(query, key, *expected), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 8.0},
        {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        {
            "rope_type": "yarn",
            "factor": 40.0,
            "original_max_position_embeddings": 4096,
            "attention_factor": 1.37,
        },
        {
            "rope_type": "yarn",
            "factor": 3.0,
            "original_max_position_embeddings": 5000,
            "attention_factor": 1.0,
            "beta_fast": 20.0,
            "beta_slow": 3.0,
            "truncate": False,
        },
    ],
)
def test_stretched_rotary(rope):
    rope = {"rope_theta": 500000.0, **rope}
    text = text_config("llama", head_dim=128, rope_parameters=rope)
    position = torch.tensor([[0, 1, 77, 8191, 100000]])
    expected = llama.LlamaRotaryEmbedding(text)(noise(1, 5, 8), position)
    found = rotary_of(text)(position, torch.float32)
    for ours, theirs in zip(found[:2], expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_are_scaled_by_their_position(dtype):
    """With the bits of transformers' layer; keys are not, and a step scales by its own rows."""
    text = text_config("ministral3", head_dim=128)
    position = torch.tensor([[0, 3, 4, 7, 8, 30, 31, 32, 4000]])
    query = noise(1, 4, 9, 128, dtype=dtype)
    expected = ministral3.Ministral3RotaryEmbedding(text)(query, position)
    turned, _ = ministral3.apply_rotary_pos_emb(query, query, *expected)
    scale = ministral3.get_llama_4_attn_scale(position, 0.2, 4).to(dtype)
    found = rotary_of(text)(position, dtype)
    assert torch.equal(rotate_queries(query, found), turned * scale)
    assert torch.equal(rotate(query, found), turned)
    assert torch.equal(rotate_queries(query[:, :, 5:], found), (turned * scale)[:, :, 5:])


def test_rotary_takes_the_last_rows():
    """A step rotates its own rows by the last factors, and no rows by none."""
    rotation = rotary_of(text_config("mistral"))(torch.arange(6)[None], torch.float32)
    x = noise(1, 2, 6, 8)
    whole = rotate(x, rotation)
    assert torch.equal(rotate(x[:, :, 4:], rotation), whole[:, :, 4:])
    assert rotate(x[:, :, 6:], rotation).shape == (1, 2, 0, 8)


def test_a_model_in_bf16_keeps_its_positions():
    """Frequencies that are rounded to bf16 would move a row at 3000 by many positions."""
    rotary = rotary_of(text_config("mistral"))
    position = torch.tensor([[3000]])
    expected = rotary(position, torch.float32)
    found = rotary.to(torch.bfloat16)(position, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(expected[:2], found[:2], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [32, 48, 2304, 3584, 4608])
def test_scaled_embedding(width, dtype):
    theirs = gemma2.Gemma2TextScaledWordEmbedding(9, width, 0, width**0.5)
    ours, theirs = same_weights(DattnEmbedding(9, width, 0, width**0.5), theirs, dtype)
    ids = torch.tensor([[1, 8, 0, 3]])
    assert torch.equal(ours(ids), theirs(ids))
    plain = DattnEmbedding(9, width, 0, None).to(dtype)
    assert torch.equal(plain(ids), torch.nn.functional.embedding(ids, plain.weight))


def test_repeated_heads():
    x = noise(2, 3, 5, 8)
    for times in (1, 4):
        assert torch.equal(repeat_heads(x, times), mistral.repeat_kv(x, times))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mistral", {"hidden_act": "gelu"}, "text_config.hidden_act is 'gelu'; .* say 'silu'"),
        ("gemma2", {"hidden_activation": "silu"}, "hidden_activation is 'silu'.*gelu_pytorch_tanh"),
    ],
)
def test_another_activation_is_refused(family, changes, message):
    with pytest.raises(ValueError, match=message):
        DattnMLP(text_config(family, **changes), ACTIVATIONS[family])


def test_other_rotary_positions_are_refused():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}
    with pytest.raises(ValueError, match="rope_type must be one of default, linear, llama3, yarn"):
        rotary_of(text_config("mistral", rope_parameters=rope))
    rope = {**text_config("ministral3").rope_parameters, "attention_factor": None, "mscale": 1.0}
    with pytest.raises(ValueError, match="they must have attention_factor"):
        rotary_of(text_config("ministral3", rope_parameters=rope))


@pytest.mark.parametrize("image", [(100, 30), (30, 100), (384, 384), (1, 999), (1000, 667)])
def test_canvas_is_the_one_of_llava_next(image):
    grids = [(columns, rows) for rows in (1, 2, 3) for columns in (1, 2, 3)]
    canvases = [(384 * rows, 384 * columns) for columns, rows in grids]
    columns, rows = best_grid(image[::-1], (384, 384), grids, "first")
    assert (384 * rows, 384 * columns) == select_best_resolution(image, canvases)
    pixels = noise(3, *image).numpy()
    for canvas in canvases:
        expected = get_patch_output_size(pixels, canvas, ChannelDimension.FIRST)
        assert inner_size(image, canvas) == expected


def test_layers_without_positions_rotate_nothing():
    """To the last bit, also of zeros and of bf16."""
    rotary = DattnRotary(8, {"rope_type": "none", "rope_theta": 1.0})
    for dtype in DTYPES:
        x = noise(1, 2, 6, 8, dtype=dtype)
        found = rotary(torch.arange(6)[None] + 30000, dtype)
        assert found.query_scale is None and torch.equal(rotate_queries(x, found), x)
