"""Frequencies and factors of every kind of rotary positions against transformers' own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Ministral3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.ministral3.modeling_ministral3 import get_llama_4_attn_scale

from dattn_mcore.architectures.records import Unsupported
from dattn_mcore.architectures.rope import rope_from_hf, rope_to_hf
from dattn_mcore.architectures.sizes import NOT_ROTATED, LlmConfig, RopeConfig
from dattn_mcore.layers.attention.frequencies import query_factor, rotary_frequencies
from dattn_mcore.layers.attention.rotary import rotary_angles, rotate

# As of published models; then what their blends and bounds leave out.
STRETCHED = {
    "default": RopeConfig(),
    "linear": RopeConfig(kind="linear", factor=8.0),
    "llama3": RopeConfig(kind="llama3", factor=32.0),
    "yarn": RopeConfig(kind="yarn", factor=16.0, original_length=16384),
    "yarn, not truncated": RopeConfig(
        kind="yarn", factor=16.0, original_length=16384, truncate=False
    ),
    "yarn, other borders": RopeConfig(
        kind="yarn", factor=48.0, original_length=8192, beta_slow=2.0, beta_fast=4.0
    ),
    "yarn, borders beyond both ends": RopeConfig(
        kind="yarn", factor=4.0, original_length=100, beta_slow=1e-9, beta_fast=1e4
    ),
    "yarn, borders in one place": RopeConfig(
        kind="yarn", factor=4.0, original_length=7, beta_slow=2.0, beta_fast=4.0
    ),
}
YARN = RopeConfig(
    kind="yarn", factor=16.0, original_length=64, attention_factor=1.25, query_scale_beta=0.1
)


def theirs(rope: RopeConfig, base: float, head_dim: int) -> tuple[torch.Tensor, float]:
    """Frequencies and attention factor that transformers works out."""
    config = LlamaConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        rope_parameters=rope_to_hf(base, rope),
    )
    if rope.kind == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    return ROPE_INIT_FUNCTIONS[rope.kind](config, "cpu")


@pytest.mark.parametrize(("base", "head_dim"), [(1e6, 128), (1e9, 128), (100.0, 8), (10000.0, 64)])
@pytest.mark.parametrize("name", STRETCHED)
def test_frequencies_are_those_of_transformers(name: str, base: float, head_dim: int) -> None:
    rope = STRETCHED[name]
    expected, factor = theirs(rope, base, head_dim)
    found = rotary_frequencies(head_dim, base, rope)
    # A few float32 roundings, in another order of operations.
    torch.testing.assert_close(found, expected, atol=0, rtol=1e-6)
    assert factor == rope.attention_factor


def test_every_published_blend_differs() -> None:
    """The cases above tell their parameters apart."""
    found = [rotary_frequencies(128, 1e6, rope) for rope in list(STRETCHED.values())[:6]]
    for index, first in enumerate(found):
        for second in found[index + 1 :]:
            assert ((first - second).abs() / first).max() > 1e-3


def test_the_factor_of_queries_is_that_of_ministral() -> None:
    """The attention factor of both sides of a logit, times the scale by position."""
    positions = torch.tensor([0, 1, 63, 64, 127, 128, 16383, 16384, 262143])
    scale = get_llama_4_attn_scale(positions[None], YARN.query_scale_beta, YARN.original_length)
    _, factor = theirs(YARN, 1e6, 128)
    found = query_factor(positions, YARN)
    assert found is not None and found.shape == (len(positions), 1, 1, 1)
    torch.testing.assert_close(found.flatten(), factor**2 * scale.flatten(), atol=0, rtol=1e-6)
    assert found[2] < found[3]  # the scale begins to grow with the second length


@pytest.mark.parametrize("name", STRETCHED)
def test_where_nothing_is_scaled_nothing_is_multiplied(name: str) -> None:
    assert query_factor(torch.arange(9), STRETCHED[name]) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_layer_without_rotary_positions_rotates_nothing(dtype: torch.dtype) -> None:
    """To the last bit, and it scales no query, whatever the other layers do."""
    llm = LlmConfig(rope=YARN, rotary_pattern=(True, True, False))
    assert [llm.rope_of(layer) for layer in range(4)] == [
        (10000.0, YARN),
        (10000.0, YARN),
        (10000.0, NOT_ROTATED),
        (10000.0, YARN),
    ]
    frequencies = rotary_frequencies(16, *llm.rope_of(2))
    positions = torch.tensor([0, 1, 77, 9000])
    rows = torch.randn(4, 3, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(rotate(rows, rotary_angles(positions, frequencies)), rows)
    assert query_factor(positions, NOT_ROTATED) is None


PUBLISHED = dict(Ministral3Config().rope_parameters)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mscale": 0.707},
        {"mscale": 2.0, "mscale_all_dim": 0.5},
        {"mscale_all_dim": 0.0},
        {"mscale": None, "mscale_all_dim": None},
        {"factor": 1.0, "mscale_all_dim": None},
        {"attention_factor": 1.5},
        {"beta_fast": None, "beta_slow": None},
        {"truncate": False},
    ],
    ids=str,
)
def test_what_a_folder_says_is_what_transformers_makes_of_it(changes: dict[str, Any]) -> None:
    """Among them the attention factor, from any of the fields that decide it."""
    fields = {**PUBLISHED, **changes}
    config = Ministral3Config(rope_parameters=fields)
    expected, factor = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    base, rope = rope_from_hf(config.rope_parameters, ("yarn",))
    assert rope.attention_factor == pytest.approx(factor, rel=1e-12)
    found = rotary_frequencies(config.head_dim, base, rope)
    torch.testing.assert_close(found, expected, atol=0, rtol=1e-6)
    again, factor = theirs(rope, base, config.head_dim)  # and what is written means the same
    assert torch.equal(again, expected) and factor == pytest.approx(rope.attention_factor)
    assert rope_from_hf(rope_to_hf(base, rope), ("yarn",)) == (base, rope)


def test_a_folder_without_a_factor_is_refused() -> None:
    with pytest.raises(Unsupported, match="no factor; write it"):
        rope_from_hf({**PUBLISHED, "factor": None}, ("yarn",))


def test_the_embedded_defaults_are_transformers_own() -> None:
    """What a YAML file leaves out is what a folder leaves out."""
    bare = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 2.0, "attention_factor": 1.0}
    _, rope = rope_from_hf({**bare, "original_max_position_embeddings": 8192}, ("yarn",))
    assert rope == replace(RopeConfig(kind="yarn"), factor=2.0)
