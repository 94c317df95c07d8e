"""Generation: cached, uncached, batched with left padding, beams, several images."""

import itertools

import pytest
import torch

from dattn_mcore.hf import DattnCache
from tests.unit.hf.hf_models import IMAGE, make_model, pixels

PROMPTS = [
    [1, 5, 6, IMAGE, 7, 8, 9, IMAGE, 10, 11],
    [IMAGE, 1, 12, 13],
    [1, 30, 31, 32, 33, 34, 35],
]
IMAGES = [2, 1, 0]
MODES = list(itertools.product(("diagonal", "causal"), ("none", "rope"), ("alpha", "sum")))
LENGTH = 8


def batch(prompts=PROMPTS, images=IMAGES):
    """Left-padded batch of prompts with their images."""
    longest = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[0] * (longest - len(p)) + p for p in prompts]),
        "attention_mask": torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]),
        "pixel_values": pixels(sum(images)) if sum(images) else None,
    }


def generate(model, inputs, **changes):
    """Greedy generation of LENGTH tokens; returns tokens and their logits."""
    output = model.generate(
        **inputs,
        max_new_tokens=LENGTH,
        min_new_tokens=LENGTH,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **changes,
    )
    return output.sequences[:, -LENGTH:], torch.stack(output.logits, dim=1)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "ministral3"])
@pytest.mark.parametrize(("v2v", "t2v_position", "merge"), MODES)
def test_cached_equals_uncached_and_alone(v2v, t2v_position, merge, family):
    """The same tokens and logits with and without cache, in a batch and alone.

    The last family scales queries by their positions, of which every step has others.
    """
    text = {"sliding_window": 4} if family == "mistral" else {}
    model = make_model(family, text=text, v2v=v2v, t2v_position=t2v_position, merge=merge)
    tokens, logits = generate(model, batch())
    plain_tokens, plain_logits = generate(model, batch(), use_cache=False)
    assert torch.equal(tokens, plain_tokens)
    torch.testing.assert_close(logits, plain_logits, atol=2e-5, rtol=0)
    first = 0
    for i, (prompt, count) in enumerate(zip(PROMPTS, IMAGES, strict=True)):
        inputs = {"input_ids": torch.tensor([prompt])}
        if count:
            inputs["pixel_values"] = pixels(sum(IMAGES))[first : first + count]
        first += count
        alone_tokens, alone_logits = generate(model, inputs)
        assert torch.equal(tokens[i], alone_tokens[0])
        torch.testing.assert_close(logits[i], alone_logits[0], atol=2e-5, rtol=0)


def test_vision_tower_runs_once_a_generation():
    """Visual keys and values come from the cache after the first step."""
    model = make_model()
    calls = []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append("tower"))
    model.model.multi_modal_projector.register_forward_hook(lambda *_: calls.append("projector"))
    generate(model, batch())
    assert calls == ["tower", "projector"]


def test_text_only_batch():
    """A batch without any image generates."""
    model = make_model()
    inputs = batch([[1, 30, 31], [1, 32, 33, 34, 35]], [0, 0])
    inputs.pop("pixel_values")
    tokens, _ = generate(model, inputs)
    alone, _ = generate(model, {"input_ids": torch.tensor([[1, 30, 31]])})
    assert torch.equal(tokens[0], alone[0])


def test_second_turn_with_another_image_goes_on_with_the_cache():
    """A cache can be continued with text and a new image, in every mode."""
    for v2v, t2v_position, merge in MODES:
        model = make_model(v2v=v2v, t2v_position=t2v_position, merge=merge)
        input_ids, images = torch.tensor([PROMPTS[0]]), pixels(2)
        with torch.no_grad():
            whole = model(input_ids, images).logits
            first = model(input_ids[:, :6], images[:1], use_cache=True)
            second = model(input_ids[:, 6:], images[1:], past_key_values=first.past_key_values)
        torch.testing.assert_close(second.logits, whole[:, 6:], atol=2e-5, rtol=0)


@pytest.mark.parametrize("changes", [{"num_beams": 3}, {"num_beams": 2, "use_cache": False}])
def test_beams_keep_images_with_their_sample(changes):
    """Beam search in a batch finds what it finds alone."""
    model = make_model()
    out = model.generate(**batch(), max_new_tokens=LENGTH, min_new_tokens=LENGTH, **changes)
    alone = model.generate(
        torch.tensor([PROMPTS[0]]),
        pixel_values=pixels(3)[:2],
        max_new_tokens=LENGTH,
        min_new_tokens=LENGTH,
        **changes,
    )
    assert torch.equal(out[0, -LENGTH:], alone[0, -LENGTH:])


def test_guessed_tokens_change_no_answer():
    """Prompt lookup guesses several tokens at once and crops the cache after wrong ones."""
    model = make_model()
    inputs = {"input_ids": torch.tensor([PROMPTS[0] * 2]), "pixel_values": pixels(4)}
    settings = {"max_new_tokens": LENGTH, "do_sample": False}
    expected = model.generate(**inputs, **settings)
    assert torch.equal(model.generate(**inputs, **settings, prompt_lookup_num_tokens=3), expected)


def test_wrong_inputs_are_refused():
    """Image count, and a cache that cannot hold visual keys."""
    model = make_model()
    with pytest.raises(ValueError, match="2 image placeholders.*hold 1 images"):
        model(torch.tensor([PROMPTS[0]]), pixels(1))
    cache = DattnCache()
    model(torch.tensor([PROMPTS[0]]), pixels(2), past_key_values=cache)
    with pytest.raises(ValueError, match="across an image"):
        cache.crop(-4)


def test_cropped_cache_forgets_its_last_columns():
    """crop removes text columns only and keeps positions right."""
    model = make_model(v2v="causal", t2v_position="rope")
    with torch.no_grad():
        expected = model(torch.tensor([PROMPTS[0] + [15]]), pixels(2)).logits[:, -1]
        cache = DattnCache()
        model(torch.tensor([PROMPTS[0] + [40, 41]]), pixels(2), past_key_values=cache)
        cache.crop(-2)
        again = model(torch.tensor([[15]]), past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(again, expected, atol=2e-5, rtol=0)
