"""The cache of images: its bound in bytes, what empties it, what it refuses."""

import pytest
import torch

from dattn_mcore.hf import DattnImageCache
from dattn_mcore.hf.image_cache_dattn import alike
from tests.unit.hf.hf_models import IMAGE, ids, make_model, pixels

ROWS, LAYERS, KV_HEADS, HEAD_DIM = 9, 3, 2, 8
BYTES = 2 * LAYERS * ROWS * KV_HEADS * HEAD_DIM * 4  # of one image in float32


def ask(model, image, cache=None, seed=0):
    """Logits of the last column of a question about one image."""
    with torch.no_grad():
        return model(ids(1, IMAGE, 7), pixels(5, seed)[image : image + 1], image_cache=cache).logits


def test_the_least_recently_used_image_is_dropped():
    model, cache = make_model(), DattnImageCache(2 * BYTES)
    for image in (0, 1, 0, 2):  # 1 was used before 0
        ask(model, image, cache)
        assert cache.nbytes == len(cache) * BYTES <= cache.max_bytes
    assert (cache.misses, cache.hits, len(cache)) == (3, 1, 2)
    ask(model, 0, cache)
    assert cache.hits == 2
    ask(model, 1, cache)
    assert cache.misses == 4


def test_what_does_not_fit_is_computed_each_time():
    """A batch of more images than fit is answered rightly all the same."""
    model = make_model()
    for room in (0, BYTES - 1, BYTES):
        cache = DattnImageCache(room)
        tokens, images = ids(IMAGE, 5, IMAGE, 6, IMAGE, 7), pixels(3)
        with torch.no_grad():
            expected = model(tokens, images).logits[:, 1::2]
            for _ in range(2):
                found = model(tokens, images, image_cache=cache).logits[:, 1::2]
                # Rounding of float32 in two orders; another image moves logits by 0.1.
                torch.testing.assert_close(found, expected, atol=4e-6, rtol=0)
        assert cache.misses == 6 and cache.nbytes == room // BYTES * BYTES


def test_held_memory_is_the_images_own():
    """No larger buffer is kept alive behind what is counted."""
    model, cache = make_model(), DattnImageCache()
    ask(model, 0, cache)
    (image,) = cache.held.values()
    assert sum(t.untyped_storage().nbytes() for t in (*image.keys, *image.values)) == BYTES


def add_in_place(model):
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.up_proj.weight[3, 5] += 0.5


def add_by_data(model):
    """As adapters are merged: neither place nor version of the weight changes."""
    weight = model.model.language_model.layers[1].self_attn.v_proj.weight
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    place, version = weight.data_ptr(), weight._version
    weight.data += 0.1 * noise
    assert (weight.data_ptr(), weight._version) == (place, version)


def change_tower(model):
    with torch.no_grad():
        next(model.model.vision_tower.parameters()).mul_(1.5)


def other_values(model):
    state = {name: value * 1.1 for name, value in model.state_dict().items()}
    model.load_state_dict(state)


def replace_weight(model):
    layer = model.model.language_model.layers[0].self_attn.k_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 1.2)


def hook(model):
    layer = model.model.language_model.layers[0]
    layer.mlp.register_forward_hook(lambda module, given, output: output * 0.5)


def train_a_step(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    model(ids(1, IMAGE, 7), pixels(1)).logits.square().mean().backward()
    optimizer.step()


def wider(model):
    model.to(torch.float64)


CHANGES = [
    add_in_place,
    add_by_data,
    change_tower,
    other_values,
    replace_weight,
    hook,
    train_a_step,
    wider,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_empties_the_cache(change):
    model, cache = make_model(), DattnImageCache()
    before = ask(model, 0, cache)
    assert torch.equal(ask(model, 0, cache), before) and cache.misses == 1
    change(model)
    expected = ask(model, 0)
    assert not torch.equal(expected[0, 2].float(), before[0, 2])
    assert torch.equal(ask(model, 0, cache)[:, 2], expected[:, 2])
    assert (cache.misses, len(cache)) == (2, 1)


def test_adapters_switched_off_on_and_merged():
    """peft changes what a layer computes by its settings, or adds to weights through `.data`."""
    peft = pytest.importorskip("peft")
    model, cache = make_model(), DattnImageCache()
    plain = ask(model, 0, cache)
    settings = peft.LoraConfig(r=2, target_modules=["v_proj", "up_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, settings).eval()
    tuned = ask(adapted, 0, cache)
    assert torch.equal(tuned, ask(adapted, 0)) and not torch.equal(tuned, plain)
    with adapted.disable_adapter():
        assert torch.equal(ask(adapted, 0, cache)[:, 2], plain[:, 2])
    assert torch.equal(ask(adapted, 0, cache), tuned)
    adapted.merge_adapter()
    assert torch.equal(ask(adapted, 0, cache), ask(adapted, 0))
    assert (cache.misses, cache.hits) == (5, 0)
    adapted.generate(ids(1, IMAGE, 7), pixel_values=pixels(5)[:1], image_cache=cache)
    assert cache.hits == 1


def test_two_models_do_not_read_each_others_images():
    one, other, cache = make_model(), make_model(seed=1), DattnImageCache()
    for model in (one, other, one):
        assert torch.equal(ask(model, 0, cache)[:, 2], ask(model, 0)[:, 2])
    assert cache.misses == 3


def test_autocast_is_another_arithmetic():
    model, cache = make_model(), DattnImageCache()
    ask(model, 0, cache)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ask(model, 0, cache)[:, 2], ask(model, 0)[:, 2])
    assert cache.misses == 2


def test_a_pixel_makes_another_image():
    model, cache = make_model(), DattnImageCache()
    images = pixels(1)
    changed = images.clone()
    changed[0, 2, 11, 11] += 1e-6
    swapped = images.flip(-1)
    with torch.no_grad():
        for image in (images, changed, swapped):
            model(ids(IMAGE, 7), image, image_cache=cache)
        model(ids(IMAGE, IMAGE, 7), torch.cat([images, swapped]), image_cache=cache)
    assert (cache.misses, cache.hits) == (3, 2)


def test_images_that_agree_in_the_numbers_looked_at_first_are_told_apart():
    images = list(torch.zeros(4, 1, 3, 64, 64))
    images[2] = images[2].clone()
    images[2][0, 1, 30, 31] = 1.0  # not one of the first look
    grids = torch.tensor([[0, 0], [0, 0], [0, 0], [1, 1]])
    assert alike(images, grids) == [0, 0, 2, 3]
    assert alike([image.bfloat16() for image in images], grids) == [0, 0, 2, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"v2v": "causal"}, "v2v is 'causal'.*leave image_cache out"),
        ({"t2v_position": "rope"}, "t2v_position is 'rope'.*leave image_cache out"),
    ],
)
def test_modes_in_which_rows_depend_on_more_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ask(make_model(**changes), 0, DattnImageCache())


def test_training_and_gradients_are_refused():
    model, cache = make_model(), DattnImageCache()
    with pytest.raises(ValueError, match=r"keeps no gradients.*torch.no_grad\(\)"):
        model(ids(1, IMAGE, 7), pixels(1), image_cache=cache)
    with pytest.raises(ValueError, match="training mode; call model.eval"):
        ask(model.train(), 0, cache)


def test_weights_whose_changes_are_not_counted_are_refused():
    with torch.inference_mode():
        model = make_model()
        with pytest.raises(ValueError, match="load the model outside of it"):
            ask(model, 0, DattnImageCache())


def test_wrong_arguments_are_refused():
    model = make_model()
    with pytest.raises(ValueError, match="image_cache is a dict; it must be a DattnImageCache"):
        ask(model, 0, {})
    for size in (-1, 0.5, True, "4"):
        with pytest.raises(ValueError, match="max_bytes is .*; it must be a number of bytes"):
            model.make_image_cache(size)
    with pytest.raises(ValueError, match="2 image placeholders .* hold 1 images"), torch.no_grad():
        model(ids(IMAGE, IMAGE, 7), pixels(1), image_cache=DattnImageCache())
