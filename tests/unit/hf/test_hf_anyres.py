"""AnyRes in the Hugging Face model: against the float64 reference, cached, batched, in beams."""

import itertools

import pytest
import torch

from dattn_mcore.hf.visual_dattn import tower_features
from tests.unit.hf.hf_models import IMAGE, make_model, pixels
from tests.unit.hf.hf_reference import reference_logits
from tests.unit.hf.test_hf_generate import generate

# Samples with their images' grids: of different sizes, in a row, one tile, none at all.
SAMPLES = [
    ([1, 5, 6, IMAGE, 7, 8, 9, IMAGE, 10, 11], [(2, 1), (1, 3)]),
    ([IMAGE, 1, 12, 13], [(0, 0)]),
    ([1, IMAGE, IMAGE, 20, 21, 22], [(2, 2), (0, 0)]),
    ([1, 30, 31, 32, 33, 34, 35], []),
]
GRIDS = [grid for _, grids in SAMPLES for grid in grids]
MODES = list(itertools.product(("diagonal", "causal"), ("none", "rope"), ("alpha", "sum")))
# Each of the three choices once with either value, both families.
CASES = [
    ("mistral", "siglip", ("diagonal", "none", "alpha")),
    ("gemma2", "clip", ("diagonal", "none", "alpha")),
    ("gemma2", "siglip", ("causal", "rope", "alpha")),
    ("mistral", "siglip", ("causal", "none", "sum")),
    ("mistral", "clip", ("diagonal", "rope", "sum")),
]


def tiles(grids):
    return sum(1 + columns * rows for columns, rows in grids)


def batch():
    """Left-padded batch of all samples with their tiles and grids."""
    longest = max(len(tokens) for tokens, _ in SAMPLES)
    return {
        "input_ids": torch.tensor([[0] * (longest - len(t)) + t for t, _ in SAMPLES]),
        "attention_mask": torch.tensor(
            [[0] * (longest - len(t)) + [1] * len(t) for t, _ in SAMPLES]
        ),
        "pixel_values": pixels(tiles(GRIDS)),
        "image_grids": torch.tensor(GRIDS),
    }


def alone():
    """The same samples one by one."""
    first = 0
    for tokens, grids in SAMPLES:
        inputs = {"input_ids": torch.tensor([tokens])}
        if grids:
            inputs["pixel_values"] = pixels(tiles(GRIDS))[first : first + tiles(grids)]
            inputs["image_grids"] = torch.tensor(grids)
        first += tiles(grids)
        yield inputs


def model_of(family, kind, mode, **changes):
    names = ("v2v", "t2v_position", "merge")
    text = {"sliding_window": 4} if family == "mistral" else {}
    return make_model(family, kind, text=text, **dict(zip(names, mode, strict=True)), **changes)


@pytest.mark.parametrize(("family", "kind", "mode"), CASES)
def test_logits_equal_reference(family, kind, mode):
    """Stitched row by row in the reference, whatever the mode; a batch and each implementation."""
    # 2 x 2 rows a tile, since the reference loops over pairs of rows.
    model = model_of(family, kind, mode, vision={"patch_size": 6})
    inputs = batch()
    logits = {}
    with torch.no_grad():
        for implementation in ("eager", "sdpa"):
            model.set_attn_implementation(implementation)
            logits[implementation] = model(**inputs).logits
        features = tower_features(model.model.vision_tower, inputs["pixel_values"], kind == "clip")
    first = 0
    for i, (tokens, grids) in enumerate(SAMPLES):
        last = first + tiles(grids)
        expected = reference_logits(
            model.state_dict(), model.config, tokens, features[first:last], grids
        )
        first = last
        live = (inputs["input_ids"][i] != IMAGE) & inputs["attention_mask"][i].bool()
        for implementation, found in logits.items():
            # float32 against float64, three layers, logits near 1: rounding is near 1e-6
            difference = (found[i, live].double() - expected).abs().max()
            assert difference < 2e-5, (i, implementation, difference)


def test_without_positions_the_order_of_rows_is_all_that_grids_change():
    """In D-Attn visual rows without positions are a set, so 2 x 1 and 1 x 2 tiles are the same."""
    for positions in (False, True):
        model = make_model(visual_positions=positions)
        input_ids, pixel_values = torch.tensor([[1, IMAGE, 5, 6]]), pixels(3)
        with torch.no_grad():
            a, b = (
                model(input_ids, pixel_values, image_grids=torch.tensor([grid])).logits[0, 2:]
                for grid in ((2, 1), (1, 2))
            )
        assert ((a - b).abs().max() > 1e-3) == positions


@pytest.mark.parametrize(("family", "kind", "mode"), CASES)
def test_cached_equals_uncached_and_alone(family, kind, mode):
    """Mixed batch, left padding: the same tokens and logits with and without cache, and alone."""
    model = model_of(family, kind, mode)
    tokens, logits = generate(model, batch())
    plain_tokens, plain_logits = generate(model, batch(), use_cache=False)
    assert torch.equal(tokens, plain_tokens)
    torch.testing.assert_close(logits, plain_logits, atol=2e-5, rtol=0)
    for i, inputs in enumerate(alone()):
        alone_tokens, alone_logits = generate(model, inputs)
        assert torch.equal(tokens[i], alone_tokens[0])
        torch.testing.assert_close(logits[i], alone_logits[0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_bfloat16_generates(family):
    """In bf16 too, every step reads the cache as it would read the whole sequence."""
    model = make_model(family).to(torch.bfloat16)
    tokens, logits = generate(model, batch())
    assert logits.dtype in (torch.bfloat16, torch.float32)
    # The uncached model over what was generated: other shapes round otherwise, so logits of order
    # one agree to a few of bf16's 2**-8 steps, and tokens wherever the best is clearly the best.
    inputs = batch()
    pad = tokens.shape[1] - 1
    inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens[:, :-1]], dim=1)
    inputs["attention_mask"] = torch.nn.functional.pad(inputs["attention_mask"], (0, pad), value=1)
    with torch.no_grad():
        whole = model(**inputs).logits[:, -tokens.shape[1] :].float()
    whole[..., [IMAGE, 2]] = -torch.inf  # generation suppresses images, and the end before LENGTH
    logits = logits.float()
    finite = whole.isfinite()
    assert (whole - logits)[finite].abs().max() < 0.06 * whole[finite].abs().max()
    margin = whole.topk(2).values
    clear = margin[..., 0] - margin[..., 1] > 0.1 * whole[finite].abs().max()
    assert clear.float().mean() > 0.3  # else the next line says little
    assert torch.equal(whole.argmax(-1)[clear], tokens[clear])


def test_a_second_turn_with_another_image_goes_on_with_the_cache():
    for mode in MODES:
        model = model_of("mistral", "siglip", mode)
        tokens, grids = SAMPLES[0]
        input_ids, pixel_values = torch.tensor([tokens]), pixels(tiles(grids))
        first, second = torch.tensor(grids[:1]), torch.tensor(grids[1:])
        cut = tiles(grids[:1])
        with torch.no_grad():
            whole = model(input_ids, pixel_values, image_grids=torch.tensor(grids)).logits
            start = model(input_ids[:, :6], pixel_values[:cut], image_grids=first, use_cache=True)
            rest = model(
                input_ids[:, 6:],
                pixel_values[cut:],
                image_grids=second,
                past_key_values=start.past_key_values,
            )
        torch.testing.assert_close(rest.logits, whole[:, 6:], atol=2e-5, rtol=0)


@pytest.mark.parametrize("changes", [{"num_beams": 3}, {"num_beams": 2, "use_cache": False}])
def test_beams_keep_tiles_with_their_sample(changes):
    model = make_model()
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, **changes}
    out = model.generate(**batch(), **settings)
    for i, inputs in enumerate(alone()):
        assert torch.equal(out[i, -6:], model.generate(**inputs, **settings)[0, -6:])


def test_tiles_that_are_not_those_of_the_grids_are_refused():
    model = make_model()
    input_ids = torch.tensor([[1, IMAGE, 5]])
    with pytest.raises(ValueError, match="hold 2 tiles, but image_grids name 3"):
        model(input_ids, pixels(2), image_grids=torch.tensor([[2, 1]]))
    with pytest.raises(ValueError, match="1 image placeholders.*hold 2 images"):
        model(input_ids, pixels(2), image_grids=torch.tensor([[0, 0], [0, 0]]))
