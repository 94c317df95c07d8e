"""One copy of the images that several samples show: the same numbers as a copy for each sample."""

import copy

import pytest
import torch

from dattn_mcore.hf import DattnCache, DattnImageCache, shared_attention_dattn
from dattn_mcore.hf.layout_dattn import Readers
from dattn_mcore.hf.samples_dattn import by_sample, one_after_another
from tests.unit.hf.hf_models import IMAGE, VOCAB, ids, make_model, pixels
from tests.unit.hf.test_hf_image_cache import FAMILIES, difference, live

# Text before, between and behind images; an image twice in one sample; none at all.
PROMPTS = [
    [1, 5, 6, IMAGE, 7, 8, 9, IMAGE, 10, 11],
    [IMAGE, 12, IMAGE, 13, 14],
    [1, IMAGE, 15],
    [1, 16, 17, IMAGE, 18, 19, 20],
    [IMAGE, 21, 22, IMAGE],
    [1, IMAGE, 23, 24],
    [1, 30, 31, 32],
    [1, 33, IMAGE, 34, 35, IMAGE, 36],
    [IMAGE, 37, IMAGE, 38],
    [1, 39, 40],
]
SHOWN = [[0, 1], [0, 1], [2], [2], [0, 0], [2], [], [0, 1], [1, 0], []]
LISTS = 5  # distinct ones of the above


def batch(right=False, only=slice(None)):
    """Prompts padded on the left or right, with their images."""
    prompts, shown = PROMPTS[only], SHOWN[only]
    longest = max(map(len, prompts))
    rows, mask = [], []
    for prompt in prompts:
        padding = [0] * (longest - len(prompt))
        ones = [1] * len(prompt)
        rows.append(prompt + padding if right else padding + prompt)
        mask.append(ones + padding if right else padding + ones)
    return {
        "input_ids": torch.tensor(rows),
        "attention_mask": torch.tensor(mask),
        "pixel_values": pixels(3)[[image for images in shown for image in images]],
    }


def questions(count=4):
    """Questions about one image, whose prompts are as long."""
    rows = [[1, IMAGE, 5 + number, 6, 7 + number] for number in range(count)]
    return {"input_ids": torch.tensor(rows), "pixel_values": pixels(1).repeat(count, 1, 1, 1)}


@pytest.mark.parametrize("merge", ["alpha", "sum"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_copies(family, merge, monkeypatch):
    """Two orders of summation of float32 lie 1e-6 of the spread apart; those of float64 1e-14.

    With all scores at once, and with those of few queries at a time.
    """
    model = make_model(family, merge=merge)
    for dtype, bound in ((torch.float32, 2e-6), (torch.float64, 1e-14)):
        model.to(dtype)
        for right, scores in ((False, 2**19), (True, 2**19), (False, 200)):
            monkeypatch.setattr(shared_attention_dattn, "CPU_SCORES", scores)
            inputs = batch(right)
            cache = DattnImageCache()
            with torch.no_grad():
                expected = model(**inputs).logits[live(inputs)]
                for _ in range(2):
                    output = model(**inputs, use_cache=True, image_cache=cache)
                    assert len(output.past_key_values.shared.lists) == LISTS
                    assert difference(output.logits[live(inputs)], expected) < bound
            assert cache.misses == 3


def test_attention_implementations_agree():
    for implementation in ("eager", "sdpa"):
        model = make_model()
        model.set_attn_implementation(implementation)
        inputs = batch()
        with torch.no_grad():
            expected = model(**inputs).logits[live(inputs)]
            found = model(**inputs, image_cache=DattnImageCache()).logits[live(inputs)]
        assert difference(found, expected) < 2e-6


def test_a_row_is_not_rounded_more_than_with_copies():
    """In bfloat16, against the same weights in float64."""
    model, inputs = make_model().bfloat16(), batch()
    with torch.no_grad():
        copies = model(**inputs).logits[live(inputs)].double()
        shared = model(**inputs, image_cache=DattnImageCache()).logits[live(inputs)].double()
        exact = model.double()(**inputs).logits[live(inputs)]
    assert 0 < difference(shared, exact) < 1.2 * difference(copies, exact)


def test_nothing_is_copied():
    """The rows are the image cache's own, before and after a reordering; pixels stay as well."""
    model, cache, inputs = make_model(), DattnImageCache(), questions()
    with torch.no_grad():
        held = model(**inputs, use_cache=True, image_cache=cache).past_key_values
    (image,) = cache.held.values()
    assert held.shared.lists[0].rows is image
    assert held.visual_live.shape[1] == 0 and all(x.numel() == 0 for x in held.visual_keys.values())
    held.reorder_cache(torch.tensor([3, 3, 0, 1]))
    held.batch_repeat_interleave(2)
    assert held.shared.lists[0].rows is image and len(held.shared.of_sample) == 8
    counts = torch.ones(4, dtype=torch.long)
    given = inputs["pixel_values"]
    tiles, grids = by_sample(given, None, counts, torch.zeros_like(counts))
    back, _ = one_after_another(tiles, grids, counts)
    assert tiles.shape == (4, 1, 3, 12, 12) and tiles.data_ptr() == back.data_ptr()
    assert tiles.data_ptr() == given.data_ptr() and torch.equal(back, given)


def test_copies_where_few_samples_show_the_same():
    """Two lists of three samples, and one sample alone."""
    model = make_model()
    for only in (slice(1, 4), slice(0, 1)):
        with torch.no_grad():
            output = model(**batch(only=only), use_cache=True, image_cache=DattnImageCache())
        held = output.past_key_values
        assert held.shared is None and held.visual_live.shape[1] == 18


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_cache": False},
        {"num_beams": 3},
        {"num_beams": 2, "use_cache": False},
        {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
        {"repetition_penalty": 1.3},
    ],
)
@pytest.mark.parametrize("merge", ["alpha", "sum"])
def test_generation_says_the_same(settings, merge):
    model, cache = make_model(merge=merge), DattnImageCache()
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False} | settings
    expected = model.generate(**batch(), **settings)
    for _ in range(2):
        assert torch.equal(model.generate(**batch(), **settings, image_cache=cache), expected)
    assert cache.misses == 3


def test_beams_of_one_sample_share_its_image():
    model, cache, held = make_model(), DattnImageCache(), []
    inputs = {"input_ids": ids(1, 5, IMAGE, 7), "pixel_values": pixels(1)}
    settings = {"max_new_tokens": 5, "num_beams": 4, "do_sample": False}
    expected = model.generate(**inputs, **settings)
    model.register_forward_hook(lambda *call: held.append(call[-1].past_key_values))
    assert torch.equal(model.generate(**inputs, **settings, image_cache=cache), expected)
    assert all(len(one.shared.lists) == 1 and len(one.shared.of_sample) == 4 for one in held)


def turns(model, second, later, image_cache=None, change=None):
    """Logits of a conversation's second and third turn, in float64."""
    first = questions()
    first["pixel_values"] = first["pixel_values"].double()
    with torch.no_grad():
        held = model(**first, use_cache=True, image_cache=image_cache).past_key_values
        if change is not None:
            change(held)
        given = {} if later is None else {"image_cache": later}
        found = model(**second, past_key_values=held, **given).logits
        return torch.cat(
            [found, model(second["input_ids"][:, -2:], past_key_values=held).logits], 1
        )


TEXT = torch.tensor([[8, 9, 10]] * 4)
MORE = torch.tensor([[8, IMAGE, 9, 10]] * 4)


@pytest.mark.parametrize(
    ("tokens", "shown", "cached", "lists"),
    [
        (TEXT, [], True, 1),
        (MORE, [1, 1, 1, 1], True, 1),
        (MORE, [0, 0, 2, 2], True, 2),  # the first turn's image again
        (MORE, [0, 1, 2, 3], True, None),
        (MORE, [0, 1, 1, 3], False, None),
    ],
)
def test_a_conversation_goes_on(tokens, shown, cached, lists):
    """With text, with the same images in all samples, others in some, and without the cache."""
    for merge in ("alpha", "sum"):
        model, cache, kept = make_model(merge=merge).double(), DattnImageCache(), []
        second = {"input_ids": tokens}
        if shown:
            second["pixel_values"] = torch.cat([pixels(1), pixels(3, seed=4)])[shown].double()
        expected = turns(model, second, None)
        found = turns(model, second, cache if cached else None, cache, kept.append)
        (held,) = kept
        assert (None if held.shared is None else len(held.shared.lists)) == lists
        text = [c for c, token in enumerate([*tokens[0].tolist(), 9, 10]) if token != IMAGE]
        assert difference(found[:, text], expected[:, text]) < 1e-13


CHANGES = {
    "reordered": lambda held: held.reorder_cache(torch.tensor([2, 0, 0, 3])),
    "selected": lambda held: held.batch_select_indices(torch.tensor([3, 2, 1, 1])),
    "repeated": lambda held: (
        held.batch_select_indices(torch.tensor([1, 3])),
        held.batch_repeat_interleave(2),
    ),
    "cropped": lambda held: held.crop(-1),
    "unshared": lambda held: held.unshare(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_cache(change):
    """Samples reordered, selected, repeated; the last column removed; or copies made."""
    model = make_model().double()
    expected = turns(model, {"input_ids": TEXT}, None, change=CHANGES[change])
    found = turns(model, {"input_ids": TEXT}, None, DattnImageCache(), change=CHANGES[change])
    assert difference(found, expected) < 1e-13


def test_a_cache_keeps_which_sample_shows_what():
    """Beams of samples with different images change places."""
    model, inputs, order = (
        make_model().double(),
        batch(),
        torch.tensor([7, 2, 1, 0, 6, 5, 4, 3, 8, 9]),
    )
    inputs["pixel_values"] = inputs["pixel_values"].double()
    tokens = torch.arange(5, 15)[:, None]
    found = []
    with torch.no_grad():
        for images in ({}, {"image_cache": DattnImageCache()}):
            held = model(**inputs, use_cache=True, **images).past_key_values
            held.reorder_cache(order)
            twin = copy.deepcopy(held)
            found += [model(tokens, past_key_values=one).logits for one in (held, twin)]
    assert twin.shared is not None and torch.equal(found[0], found[1])
    assert torch.equal(found[2], found[3]) and difference(found[2], found[0]) < 1e-13


def test_gradients_of_text_equal_those_with_copies():
    """A conversation goes on under autograd: in float64, of a layer's query weights."""
    gradients = []
    for merge in ("alpha", "sum"):
        model = make_model("gemma2", merge=merge).double()
        for change in (DattnCache.unshare, lambda held: None):
            model.zero_grad()
            first = questions()
            first["pixel_values"] = first["pixel_values"].double()
            with torch.no_grad():
                output = model(**first, use_cache=True, image_cache=DattnImageCache())
            change(output.past_key_values)
            model(TEXT, past_key_values=output.past_key_values).logits.square().sum().backward()
            weight = model.model.language_model.layers[1].self_attn.q_proj.weight
            gradients.append(weight.grad.clone())
        assert gradients[-1].norm() > 0 and difference(gradients[-1], gradients[-2]) < 1e-12


def test_an_image_token_beyond_the_vocabulary():
    model, cache, inputs = make_model(), DattnImageCache(), batch()
    model.config.image_token_id = VOCAB
    inputs["input_ids"][inputs["input_ids"] == IMAGE] = VOCAB
    settings = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(**inputs, **settings)
    assert torch.equal(model.generate(**inputs, **settings, image_cache=cache), expected)


def test_readers_go_where_their_layer_lies():
    readers = Readers(0, torch.tensor([1]), torch.ones(1, 1, 1, 9, dtype=torch.bool)).to("meta")
    assert readers.rows.is_meta and readers.visible.is_meta
    assert Readers(0, torch.tensor([1]), None).to("meta").visible is None
