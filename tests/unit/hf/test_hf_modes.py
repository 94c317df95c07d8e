"""The Hugging Face model against the float64 reference, in every attention mode."""

import itertools

import pytest
import torch

from dattn_mcore.hf.visual_dattn import tower_features
from tests.unit.hf.hf_models import IMAGE, TEXT_FEATURES, VISION_FEATURES, make_model, pixels
from tests.unit.hf.hf_reference import reference_logits

# Two images with text between, before and after; image first; several images in a row; none.
SAMPLES = {
    "interleaved": [1, 5, 6, IMAGE, 7, 8, 9, IMAGE, 10, 11],
    "image first": [IMAGE, 1, 12, 13],
    "two in a row": [1, IMAGE, IMAGE, 20, 21, 22],
    "text only": [1, 30, 31, 32, 33, 34, 35, 36],
}
MODES = list(itertools.product(("diagonal", "causal"), ("none", "rope"), ("alpha", "sum")))


@pytest.mark.parametrize("family", TEXT_FEATURES)
@pytest.mark.parametrize(("v2v", "t2v_position", "merge"), MODES)
def test_modes_equal_reference(v2v, t2v_position, merge, family):
    """Logits of a left-padded batch of all samples equal the reference's, sample by sample."""
    text = {"sliding_window": 4} if family == "mistral" else {}
    model = make_model(family, text=text, v2v=v2v, t2v_position=t2v_position, merge=merge)
    longest = max(map(len, SAMPLES.values()))
    rows = [[0] * (longest - len(s)) + s for s in SAMPLES.values()]
    mask = [[0] * (longest - len(s)) + [1] * len(s) for s in SAMPLES.values()]
    images = pixels(sum(s.count(IMAGE) for s in SAMPLES.values()))
    input_ids, mask = torch.tensor(rows), torch.tensor(mask)
    logits = {}
    with torch.no_grad():
        for implementation in ("eager", "sdpa"):
            model.set_attn_implementation(implementation)
            logits[implementation] = model(input_ids, images, mask).logits
        features = tower_features(model.model.vision_tower, images, False)
    first = 0
    for i, (name, sample) in enumerate(SAMPLES.items()):
        last = first + sample.count(IMAGE)
        expected = reference_logits(model.state_dict(), model.config, sample, features[first:last])
        first = last
        live = (input_ids[i] != IMAGE) & mask[i].bool()
        for implementation, found in logits.items():
            # float32 model of three layers against float64: rounding is near 1e-6 at logits near 1
            difference = (found[i, live].double() - expected).abs().max()
            assert difference < 2e-5, (name, implementation, difference)


@pytest.mark.parametrize("kind", VISION_FEATURES)
@pytest.mark.parametrize("visual_positions", [True, False])
def test_towers_and_positions(kind, visual_positions):
    """Every tower, and position-free projectors, agree with the reference as well."""
    model = make_model("gemma2", kind, visual_positions=visual_positions, vision_feature_layer=-2)
    images = pixels(2)
    with torch.no_grad():
        logits = model(torch.tensor([SAMPLES["interleaved"]]), images).logits[0]
        features = tower_features(model.model.vision_tower, images, kind == "clip")
    expected = reference_logits(model.state_dict(), model.config, SAMPLES["interleaved"], features)
    live = torch.tensor(SAMPLES["interleaved"]) != IMAGE
    torch.testing.assert_close(logits[live].double(), expected, atol=2e-5, rtol=0)


def test_an_image_changes_only_text_after_it():
    """Interleaved images stay causal."""
    model = make_model()
    input_ids = torch.tensor([SAMPLES["interleaved"]])
    first, second = pixels(2, seed=1), pixels(2, seed=1)
    second[1] += 1.0
    with torch.no_grad():
        a, b = model(input_ids, first).logits[0], model(input_ids, second).logits[0]
    assert torch.equal(a[:7], b[:7])
    assert not torch.allclose(a[8:], b[8:])


def test_bfloat16_stays_near_float32():
    """A bf16 model runs in every mode and keeps the logits to bf16 precision."""
    for v2v, t2v_position, merge in MODES:
        model = make_model("gemma2", v2v=v2v, t2v_position=t2v_position, merge=merge)
        input_ids, images = torch.tensor([SAMPLES["interleaved"]]), pixels(2)
        with torch.no_grad():
            wide = model(input_ids, images).logits
            narrow = model.to(torch.bfloat16)(input_ids, images).logits
        assert narrow.dtype == torch.bfloat16
        # bf16 keeps 8 bits; three layers of it drift by some percent of logits of order one
        assert (wide - narrow.float()).abs().max() < 0.35 * wide.abs().max()


def test_modes_differ():
    """Every mode gives other logits than every other, so the tests above can tell them apart."""
    results = {}
    for mode in MODES:
        model = make_model(v2v=mode[0], t2v_position=mode[1], merge=mode[2])
        with torch.no_grad():
            logits = model(torch.tensor([SAMPLES["interleaved"]]), pixels(2)).logits
        results[mode] = logits[0, -1]
    for a, b in itertools.combinations(MODES, 2):
        assert (results[a] - results[b]).abs().max() > 1e-3, (a, b)


@pytest.mark.parametrize("narrow", ["to", "bfloat16", "half", "keyword"])
def test_position_embeddings_stay_float32(narrow):
    """As `from_pretrained(dtype=...)` keeps them; all other weights are rounded."""
    model = make_model("gemma2")
    (model(torch.tensor([SAMPLES["interleaved"]]), pixels(2)).logits ** 2).mean().backward()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    {
        "to": lambda: model.to(torch.bfloat16),
        "bfloat16": lambda: model.bfloat16(),
        "half": lambda: model.half(),
        "keyword": lambda: model.to(device="cpu", dtype=torch.bfloat16),
    }[narrow]()
    expected = torch.float16 if narrow == "half" else torch.bfloat16
    for name, weight in model.named_parameters():
        if "_position." in name:
            assert torch.equal(weight, before[name]) and weight.grad.dtype == torch.float32, name
        else:
            assert weight.dtype == expected, name
    assert model.to(torch.float64).lm_head.weight.dtype == torch.float64
    positions = [weight for name, weight in model.named_parameters() if "_position." in name]
    assert positions and all(weight.dtype == torch.float64 for weight in positions)
