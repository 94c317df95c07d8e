"""Baseline mode and text-only input against transformers' own language models."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.unit.hf.hf_models import IMAGE, TEXT_FEATURES, make_model, pixels

BASELINE = {"v2v": "causal", "t2v_position": "rope", "merge": "alpha"}
TEXT_ONLY = [1, 30, 31, 32, 33, 34, 35, 36, 37, 38]
INTERLEAVED = [1, 5, 6, IMAGE, 7, 8, 9, IMAGE, 10, 11]


def stock_model(model):
    """transformers' own language model with the same weights."""
    text = model.config.text_config
    stock = AutoModelForCausalLM.from_config(text, attn_implementation="eager").eval()
    prefix = "model.language_model."
    weights = {
        name.replace(prefix, "model."): tensor
        for name, tensor in model.state_dict().items()
        if name.startswith((prefix, "lm_head"))
    }
    missing, extra = stock.load_state_dict(weights, strict=False)
    assert not extra
    assert all("rotary" in name or "embed_scale" in name for name in missing)
    return stock


def families():
    for family in TEXT_FEATURES:
        yield family, {}
    yield "mistral", {"sliding_window": 5}
    yield "gemma2", {"tie_word_embeddings": False, "attn_logit_softcapping": None}
    yield "qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    yield "ministral3", {"sliding_window": 5}


@pytest.mark.parametrize(("family", "text"), list(families()))
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_text_only_equals_stock_model(family, text, implementation):
    """Without images, D-Attn is the stock language model."""
    model = make_model(family, text=text)
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        ours = model(torch.tensor([TEXT_ONLY])).logits
        theirs = stock_model(model)(torch.tensor([TEXT_ONLY])).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("field", ["attention_factor", "llama_4_scaling_beta", "factor"])
@pytest.mark.parametrize("mode", [{}, BASELINE], ids=["dattn", "baseline"])
def test_every_field_of_yarn_is_seen(mode, field):
    """The comparisons here would not see one that does nothing."""
    rope = dict(make_model("ministral3").config.text_config.rope_parameters)
    off = {"attention_factor": 1.0, "llama_4_scaling_beta": 0.0, "factor": 1.0}
    changed = {"rope_parameters": {**rope, field: off[field]}}
    prompt = torch.tensor([[IMAGE, *TEXT_ONLY]])
    with torch.no_grad():
        first, second = (
            make_model("ministral3", text=text, **mode)(prompt, pixels(1)).logits
            for text in ({}, changed)
        )
    assert (first - second).abs().max() > 1e-3


@pytest.mark.parametrize(("family", "text"), list(families()))
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_baseline_equals_stock_model_on_concatenated_embeddings(family, text, implementation):
    """causal + rope + alpha is the stock model over the rows in reading order."""
    model = make_model(family, text=text, **BASELINE)
    model.set_attn_implementation(implementation)
    images = pixels(2)
    with torch.no_grad():
        ours = model(torch.tensor([INTERLEAVED]), images).logits[0]
        visual = iter(model.get_image_features(images))
        embed = model.get_input_embeddings()  # Gemma 2's scales inside, inputs_embeds are as is
        rows = [
            next(visual) if token == IMAGE else embed(torch.tensor([token]))
            for token in INTERLEAVED
        ]
        is_text = [len(row) == 1 for row in rows for _ in row]
        stock = stock_model(model)(inputs_embeds=torch.cat(rows)[None]).logits[0]
    live = torch.tensor(INTERLEAVED) != IMAGE
    torch.testing.assert_close(ours[live], stock[torch.tensor(is_text)], atol=1e-4, rtol=0)


def test_gemma2_embeddings_are_scaled_inside_the_embedding():
    """The installed transformers scales inside embed_tokens; visual rows must be scaled too."""
    model = make_model("gemma2")
    embed = model.get_input_embeddings()
    token = torch.tensor([5])
    torch.testing.assert_close(embed(token), embed.weight[token] * 32**0.5)
    with torch.no_grad():
        (rows,) = model.get_image_features(pixels(1))
        model.model.multi_modal_projector.scale = None
        torch.testing.assert_close(rows, model.get_image_features(pixels(1))[0] * 32**0.5)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_labels_give_the_next_text_rows_loss(family):
    """The loss skips placeholders: a row before an image predicts the text after it."""
    model = make_model(family)
    input_ids = torch.tensor([INTERLEAVED])
    labels = input_ids.masked_fill(input_ids == IMAGE, -100)
    labels[:, :2] = -100
    with torch.no_grad():
        output = model(input_ids, pixels(2), labels=labels)
    live = (input_ids[0] != IMAGE).nonzero()[:, 0]
    losses = [
        -output.logits[0, a].log_softmax(-1)[input_ids[0, b]]
        for a, b in zip(live[:-1], live[1:], strict=True)
        if labels[0, b] != -100
    ]
    torch.testing.assert_close(output.loss, torch.stack(losses).mean())
