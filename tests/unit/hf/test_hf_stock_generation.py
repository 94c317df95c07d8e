"""Generation against transformers' own Mistral and Gemma 2, whose caches forget behind windows."""

import pytest
import torch

from tests.unit.hf.hf_models import IMAGE, make_model, pixels
from tests.unit.hf.test_hf_oracle import BASELINE, INTERLEAVED, stock_model

LENGTH = 14  # with the prompts, several windows long
PROMPTS = [[1, 5, 6, 7, 8, 9, 10, 11, 12], [1, 20], [1, 30, 31, 32, 33]]
FAMILIES = [
    ("mistral", {"sliding_window": None}),
    ("mistral", {"sliding_window": 4}),
    ("gemma2", {"sliding_window": 4}),
]
SETTINGS = {
    "max_new_tokens": LENGTH,
    "min_new_tokens": LENGTH,
    "do_sample": False,
    "suppress_tokens": [IMAGE],
    "return_dict_in_generate": True,
    "output_logits": True,
}


def outputs(model, **inputs):
    out = model.generate(**inputs, **SETTINGS)
    return out.sequences[:, -LENGTH:], torch.stack(out.logits, dim=1)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("family", "text"), FAMILIES)
def test_left_padded_text(family, text, implementation):
    """Padding stands inside the window of no row, and the cache grows past the window."""
    model = make_model(family, text=text)
    model.set_attn_implementation(implementation)
    longest = max(map(len, PROMPTS))
    inputs = {
        "input_ids": torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS]),
        "attention_mask": torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS]),
    }
    tokens, logits = outputs(model, **inputs)
    expected_tokens, expected_logits = outputs(stock_model(model), **inputs)
    assert torch.equal(tokens, expected_tokens)
    # Float32, sums in another order, logits of order one.
    torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("family", "text"), FAMILIES)
def test_images_in_baseline_mode(family, text):
    """An image of 9 rows is longer than the window: most of it must be out of sight."""
    model = make_model(family, text=text, **BASELINE)
    images = pixels(2)
    tokens, logits = outputs(model, input_ids=torch.tensor([INTERLEAVED]), pixel_values=images)
    with torch.no_grad():
        visual = iter(model.get_image_features(images))
        embed = model.get_input_embeddings()
        rows = [next(visual) if t == IMAGE else embed(torch.tensor([t])) for t in INTERLEAVED]
    expected_tokens, expected_logits = outputs(
        stock_model(model), inputs_embeds=torch.cat(rows)[None]
    )
    assert torch.equal(tokens, expected_tokens)
    torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=0)


def test_the_window_matters():
    """The comparisons above would not see a window that both sides ignore."""
    inputs = {"input_ids": torch.tensor([PROMPTS[0]])}
    for family in ("mistral", "gemma2"):
        narrow, wide = (
            outputs(make_model(family, text={"sliding_window": window}), **inputs)[1]
            for window in (4, 400)
        )
        assert (narrow - wide).abs().max() > 1e-2
