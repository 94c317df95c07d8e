"""What the trainer accepts can be exported: the rules of the start and those of the converter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.activations import ACT2FN

from dattn_mcore.architectures import language_models, vision_towers
from dattn_mcore.architectures.activations import ACTIVATIONS
from dattn_mcore.config.checks import check_config
from dattn_mcore.config.schema import Config
from dattn_mcore.errors import CheckpointError, ConfigError
from dattn_mcore.hf import DattnForConditionalGeneration
from dattn_mcore.layers.activations import activation_function
from tests.unit.convert.convert_helpers import make_tokenizer, small_config
from tools.checkpoint_convert.configs import TokenIds, from_hf, to_hf

IDS = TokenIds(bos=1, eos=2, pad=0, image=330, stop=(2,))
LLM = {
    "num_attention_heads": st.sampled_from([2, 4, 6]),
    "head_dim": st.sampled_from([8, 10]),
    "query_scale": st.sampled_from([None, 8.0, 16.0, 16.5]),
    "sliding_window": st.sampled_from([None, 6]),
    "layer_pattern": st.sampled_from([(), ("sliding", "full"), ("full", "full", "sliding")]),
    "attention_softcap": st.sampled_from([None, 50.0]),
    "tie_embeddings": st.booleans(),
}
VISION = {
    "kind": st.sampled_from(sorted(vision_towers())),
    "num_layers": st.sampled_from([1, 2, 3]),
    "activation": st.sampled_from(sorted(ACTIVATIONS)),
    "select_layer": st.sampled_from([-1, -2, -3]),
}


@settings(deadline=None, max_examples=150)
@given(data=st.data(), family=st.sampled_from(sorted(language_models())))
def test_what_the_trainer_accepts_becomes_a_model_and_comes_back(data: st.DataObject, family: str):
    """A few settings differ from a model that is known to be good."""
    config = small_config("", family, "siglip")
    model = config.model

    def changed(choices: dict[str, st.SearchStrategy]) -> dict[str, object]:
        names = data.draw(st.lists(st.sampled_from(sorted(choices)), max_size=2, unique=True))
        return {name: data.draw(choices[name]) for name in names}

    model = replace(
        model,
        llm=replace(model.llm, **changed(LLM)),
        vision=replace(model.vision, **changed(VISION)),
    )
    config = replace(config, model=model)
    try:
        check_config(config)
    except ConfigError:
        return
    exported = to_hf(model, config.attention, IDS, torch.float32)
    with torch.device("meta"):
        DattnForConditionalGeneration(exported)
    back, _ = from_hf(exported, model.llm.vocab_pad_multiple)
    assert to_hf(back, config.attention, IDS, torch.float32).to_dict() == exported.to_dict()


@pytest.mark.parametrize("ours", sorted(ACTIVATIONS))
def test_activations_of_towers_are_the_same_on_both_sides(ours: str):
    x = torch.linspace(-6, 6, 1001, dtype=torch.float64)
    theirs = ACT2FN[ACTIVATIONS[ours].hugging_face](x)
    torch.testing.assert_close(activation_function(ours)(x), theirs, rtol=1e-12, atol=1e-12)
    exact = {"gelu": F.gelu(x), "quick_gelu": x * torch.sigmoid(1.702 * x)}
    if ours in exact:
        torch.testing.assert_close(theirs, exact[ours], rtol=1e-12, atol=1e-12)


def test_an_older_checkpoint_that_cannot_be_exported_says_so(tmp_path):
    config: Config = small_config(make_tokenizer(tmp_path), "mistral", "siglip")
    model = replace(config.model, vision=replace(config.model.vision, select_layer=-3))
    with pytest.raises(CheckpointError, match="model.vision.select_layer=-3 cannot be exported"):
        to_hf(model, config.attention, IDS, torch.float32)
