"""The cache of images' keys and values: the same answers, from float64 and the plain path."""

import copy
import itertools

import pytest
import torch

from dattn_mcore.hf import DattnCache, DattnImageCache
from dattn_mcore.hf.visual_dattn import tower_features
from tests.unit.hf.hf_models import IMAGE, VOCAB, ids, make_model, pixels
from tests.unit.hf.hf_reference import reference_logits
from tests.unit.hf.test_hf_anyres import batch as anyres_batch
from tests.unit.hf.test_hf_generate import generate

FAMILIES = ["mistral", "gemma2", "gemma3", "qwen2", "qwen3", "olmo2", "smollm3", "ministral3"]
PROMPTS = [
    [1, 5, 6, IMAGE, 7, 8, 9, IMAGE, 10, 11],
    [IMAGE, 1, 12, 13],
    [1, 30, 31, 32, 33, 34, 35],
    [1, IMAGE, 14],
]
SHOWN = [0, 1, 2, 0]  # which image each placeholder shows: the last sample repeats the first's


def batch(right=False):
    """Prompts padded on the left or right, with their images."""
    longest = max(map(len, PROMPTS))
    padding = [[0] * (longest - len(p)) for p in PROMPTS]
    pairs = list(zip(padding, PROMPTS, strict=True))
    rows = [p + q if right else q + p for q, p in pairs]
    ones = [[1] * len(p) for p in PROMPTS]
    mask = [o + q if right else q + o for q, o in zip(padding, ones, strict=True)]
    return {
        "input_ids": torch.tensor(rows),
        "attention_mask": torch.tensor(mask),
        "pixel_values": pixels(3)[SHOWN],
    }


def live(inputs):
    """Columns whose logits mean something: text."""
    return inputs["attention_mask"].bool() & (inputs["input_ids"] != IMAGE)


def difference(found, expected):
    """Of all logits together, relative."""
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("merge", ["alpha", "sum"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_without_the_cache(family, merge):
    """With nothing held, all held, and one image held; padded on either side.

    Two orders of summation of float32 lie 1e-6 of the spread apart; those of float64 1e-14.
    """
    model = make_model(family, merge=merge)
    for dtype, bound in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
        model.to(dtype)
        for right in (False, True):
            inputs = batch(right)
            cache = DattnImageCache()
            with torch.no_grad():
                expected = model(**inputs).logits[live(inputs)]
                first = model(**inputs, image_cache=cache).logits[live(inputs)]
                assert (cache.misses, cache.hits, len(cache)) == (3, 1, 3)
                again = model(**inputs, image_cache=cache).logits[live(inputs)]
                assert (cache.misses, cache.hits) == (3, 5)
                one = DattnImageCache()
                model(ids(1, IMAGE, 3), pixels(3)[1:2], image_cache=one)
                some = model(**inputs, image_cache=one).logits[live(inputs)]
                assert (one.misses, one.hits) == (3, 2)
            assert torch.equal(first, again) and torch.equal(first, some)
            assert difference(first, expected) < bound


@pytest.mark.parametrize("merge", ["alpha", "sum"])
@pytest.mark.parametrize("family", ["mistral", "gemma3", "olmo2"])
def test_logits_equal_the_float64_reference(family, merge):
    """An image held from another conversation, at another place, beside another image."""
    model = make_model(family, merge=merge).double()
    cache, images = DattnImageCache(), pixels(2).double()
    tokens = [1, 5, IMAGE, 6, IMAGE, 7, 8]
    with torch.no_grad():
        model(ids(IMAGE, 9), images[1:], image_cache=cache)
        found = model(ids(*tokens), images, image_cache=cache).logits[0]
        features = tower_features(model.model.vision_tower, images, class_row=False)
    assert (cache.misses, cache.hits) == (2, 1)
    expected = reference_logits(model.state_dict(), model.config, tokens, features)
    text = [column for column, token in enumerate(tokens) if token != IMAGE]
    assert difference(found[text], expected) < 1e-6  # the angles of rotations are float32


def test_one_image_in_one_sample_is_bitwise_the_same():
    """The visual rows' arithmetic has the same shapes there, with the cache and without."""
    for family, dtype in itertools.product(("mistral", "gemma2"), (torch.float32, torch.bfloat16)):
        model = make_model(family).to(dtype)
        inputs = {"input_ids": ids(1, 5, IMAGE, 7, 8), "pixel_values": pixels(1)}
        expected = generate(model, inputs)
        cache = DattnImageCache()
        for _ in range(2):
            found = generate(model, inputs, image_cache=cache)
            assert all(
                torch.equal(left, right) for left, right in zip(found, expected, strict=True)
            )
        assert (cache.misses, cache.hits) == (1, 1)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_cache": False},
        {"num_beams": 3},
        {"num_beams": 2, "use_cache": False},
        {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
    ],
)
def test_generation_says_the_same(settings):
    """Greedy, in beams, several answers a sample, and without the cache of a conversation."""
    model, cache = make_model(), DattnImageCache()
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False} | settings
    expected = model.generate(**batch(), **settings)
    calls = []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append("tower"))
    for _ in range(2):
        assert torch.equal(model.generate(**batch(), **settings, image_cache=cache), expected)
    assert len(calls) == cache.misses == 3


def test_an_image_token_beyond_the_vocabulary():
    """Its columns travel beside the ids; the cache goes with them."""
    model, cache = make_model(), DattnImageCache()
    model.config.image_token_id = VOCAB
    inputs = batch()
    inputs["input_ids"][inputs["input_ids"] == IMAGE] = VOCAB
    settings = {"max_new_tokens": 4, "do_sample": False, "repetition_penalty": 1.3}
    expected = model.generate(**inputs, **settings)
    for _ in range(2):
        assert torch.equal(model.generate(**inputs, **settings, image_cache=cache), expected)
    assert cache.misses == 3


def test_anyres_in_a_batch():
    """Images of different grids; the same pixels in another grid are another image."""
    model, cache = make_model(), DattnImageCache()
    inputs = anyres_batch()
    with torch.no_grad():
        expected = model(**inputs).logits
        found = [model(**inputs, image_cache=cache).logits for _ in range(2)]
    mask = inputs["attention_mask"].bool() & (inputs["input_ids"] != IMAGE)
    assert torch.equal(found[0], found[1])
    assert difference(found[0][mask], expected[mask]) < 1e-6
    held = cache.misses
    assert held == len(inputs["image_grids"])
    images = pixels(3, seed=9)
    with torch.no_grad():
        for grid in ((2, 1), (1, 2)):
            one = {"pixel_values": images, "image_grids": torch.tensor([grid])}
            expected = model(ids(IMAGE, 5), **one).logits
            found = model(ids(IMAGE, 5), **one, image_cache=cache).logits
            assert torch.equal(found[:, 1:], expected[:, 1:])
    assert cache.misses == held + 2


def test_a_conversation_goes_on_with_a_held_image():
    """A second turn shows an image that another conversation has shown, and text follows."""
    for merge, use in itertools.product(("alpha", "sum"), ((True, True), (False, True))):
        model, cache = make_model(merge=merge), DattnImageCache()
        tokens, images = torch.tensor([PROMPTS[0]]), pixels(2)
        with torch.no_grad():
            model(ids(IMAGE, 4), images[1:], image_cache=cache)
            expected = model(tokens, images).logits
            given = [cache if used else None for used in use]
            first = model(tokens[:, :6], images[:1], use_cache=True, image_cache=given[0])
            held = first.past_key_values
            assert isinstance(held, DattnCache)
            second = model(tokens[:, 6:9], images[1:], past_key_values=held, image_cache=given[1])
            third = model(tokens[:, 9:], past_key_values=held, image_cache=cache)
        found = torch.cat([second.logits[:, [0, 2]], third.logits], dim=1)  # an image between
        assert difference(found, expected[:, [6, 8, 9]]) < 1e-6
        assert cache.hits >= 1


def test_text_alone_needs_no_image():
    model, cache = make_model(), DattnImageCache()
    expected = generate(model, {"input_ids": ids(1, 5, 6)})
    found = generate(model, {"input_ids": ids(1, 5, 6)}, image_cache=cache)
    assert torch.equal(found[1], expected[1])
    assert (cache.misses, cache.hits, len(cache)) == (0, 0, 0)


def test_an_assistant_gets_an_empty_cache_of_its_own():
    """Another model: it must not read what this one holds."""
    model, assistant, cache = make_model(), make_model(seed=3), DattnImageCache(2**20)
    inputs = {"input_ids": ids(1, IMAGE, 7), "pixel_values": pixels(1)}
    settings = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(**inputs, **settings)
    for _ in range(2):
        found = model.generate(**inputs, **settings, assistant_model=assistant, image_cache=cache)
        assert torch.equal(found, expected)
    assert (cache.misses, cache.hits) == (1, 1)
    twin = copy.deepcopy(cache)
    assert (len(twin), twin.max_bytes, len(cache)) == (0, 2**20, 1)
