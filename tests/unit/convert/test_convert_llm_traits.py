"""What makes each language model itself: turned off, the comparison with Hugging Face's fails."""

import functools
from dataclasses import asdict, replace

import pytest
import torch
from megatron.core import dist_checkpointing

from dattn_mcore.architectures import language_models
from dattn_mcore.architectures.features import PRE_NORMS, LayerNorms
from dattn_mcore.architectures.sizes import RopeConfig
from dattn_mcore.checkpoint.state import model_state
from dattn_mcore.parallel.groups import single_process
from dattn_mcore.training.model import build_from_config
from tests.unit.convert.convert_helpers import TRAITS as TRAITS_OF
from tests.unit.convert.loaded_models import CPU, text_ids, text_logits
from tests.unit.convert.raw_models import (
    LLMS,
    make_llm,
    make_tower,
    raw_config,
)
from tests.unit.hf.hf_models import TEXT_FEATURES
from tools.checkpoint_convert.hf_to_mcore import convert_parts

_YARN = TRAITS_OF["ministral3"]["rope"]
_OF_GEMMA = {
    "query scale": {"query_scale": None},
    "post-norms": {"norms": PRE_NORMS},
    "zero-centred gamma": {"zero_centered_gamma": False},
    "embedding scale": {"scale_embeddings": False},
    "activation": {"activation": "silu"},
}
# What makes each family itself, and what turns it off: a size, or a feature.
OFF = {
    "gemma2": {
        "soft-cap": {"attention_softcap": None},
        "final cap": {"final_softcap": None},
        "window": {"sliding_window": None, "layer_pattern": ()},
        "window on every layer": {"layer_pattern": ()},
        **_OF_GEMMA,
    },
    "gemma3": {
        **_OF_GEMMA,
        "window": {"sliding_window": None, "layer_pattern": ()},
        "rotary base of sliding layers": {"sliding_rotary_base": None},
        "linear rope": {"rope": RopeConfig()},
        "norms of heads": {"qk_norm": ()},
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
    "olmo2": {
        "norms after branches": {"norms": LayerNorms()},
        "norms after attention": {"norms": LayerNorms(mlp_output="post_feedforward_layernorm")},
        "norms after MLPs": {"norms": LayerNorms(attention_output="post_attention_layernorm")},
        "norms of queries and keys": {"qk_norm": ()},
    },
    "qwen2": {"biases": {"qkv_bias": False}},
    "qwen3": {"norms of heads": {"qk_norm": ()}},
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
        assert asdict(records[family].features) == features


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
