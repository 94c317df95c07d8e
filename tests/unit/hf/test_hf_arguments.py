"""`forward` honours what it is given, or says in one line that it does not."""

from dataclasses import make_dataclass

import pytest
import torch
import transformers
from transformers import Cache, DynamicCache, StaticCache

from dattn_mcore.hf import TESTED_TRANSFORMERS, DattnCache
from dattn_mcore.hf.arguments_dattn import cache_field
from tests.unit.hf.hf_models import IMAGE, make_model, pixels
from tests.unit.hf.test_hf_oracle import TEXT_ONLY, stock_model

IDS = torch.tensor([[1, 5, IMAGE, 7, 8, 9], [1, 5, 6, 7, IMAGE, 9]])
LABELS = IDS.masked_fill(IDS == IMAGE, -100)
TEXT = torch.tensor([TEXT_ONLY])


def logits(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs).logits


def refused(model, match, ids=IDS, images=2, **kwargs):
    with pytest.raises(ValueError, match=match) as caught:
        model(ids, **({"pixel_values": pixels(images)} if images else {}), **kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        {"output_attentions": True},
        {"some_new_argument": torch.ones(1)},
        {"cu_seq_lens_q": torch.tensor([0, 6])},
        {"head_mask": torch.ones(4), "shift_labels": torch.ones(2, 6)},
        {"use_flag": False},
        {"token_type_ids": torch.ones(2, 6, dtype=torch.long)},
        {"cache_position": torch.arange(1, 7)},
    ],
)
def test_what_is_not_honoured_is_named(arguments):
    oldest, newest = TESTED_TRANSFORMERS
    names = ", ".join(sorted(arguments))
    message = f"forward does not honour {names}; .*transformers is {transformers.__version__}.*"
    refused(make_model(), f"{message}tested with {oldest} to {newest}", **arguments)


def test_what_holds_anyway_is_accepted():
    """transformers and its neighbours hand these to every model."""
    model = make_model()
    expected = logits(model, IDS, pixels(2))
    found = logits(
        model,
        IDS,
        pixels(2),
        output_attentions=False,
        output_router_logits=False,
        head_mask=None,
        inputs_embeds=None,
        token_type_ids=torch.zeros_like(IDS),
        cache_position=torch.arange(6),
    )
    assert torch.equal(found, expected)


def test_attentions_that_the_configuration_asks_for_are_refused():
    model = make_model()
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    refused(model, "forward does not honour output_attentions")


def test_packed_documents_are_refused():
    """They would read each other."""
    model, ids = make_model(), TEXT[:, :8]
    refused(model, "a row each", ids, 0, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]))
    refused(model, r"shape \[1, 3\]; it must be \[1, 8\]", ids, 0, position_ids=ids[:, :3])
    expected = logits(model, ids)
    assert torch.equal(logits(model, ids, position_ids=torch.arange(8)[None]), expected)


@pytest.mark.parametrize("t2v_position", ["none", "rope"])
def test_positions_that_the_model_derives_are_accepted(t2v_position):
    """An image counts no position, or its nine rows; padding and images are not looked at."""
    model = make_model(t2v_position=t2v_position)
    ids = torch.tensor([[0, 0, 1, 5, IMAGE, 7, 8]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    after = 2 if t2v_position == "none" else 11
    good = torch.tensor([[77, 77, 0, 1, 77, after, after + 1]])
    expected = logits(model, ids, pixels(1), mask)
    assert torch.equal(logits(model, ids, pixels(1), mask, position_ids=good), expected)
    bad = good.clone()
    bad[0, -1] += 1
    refused(model, "position_ids", ids, 1, attention_mask=mask, position_ids=bad)
    with torch.no_grad():
        start = model(ids[:, :6], pixels(1), mask[:, :6], use_cache=True, return_dict=False)
        end = model(ids[:, 6:], past_key_values=start[-1], position_ids=good[:, 6:]).logits
    torch.testing.assert_close(end, expected[:, 6:], atol=2e-5, rtol=0)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_hidden_states_are_those_of_the_stock_model(family):
    model = make_model(family)
    with torch.no_grad():
        ours = model(TEXT, output_hidden_states=True).hidden_states
        theirs = stock_model(model)(TEXT, output_hidden_states=True).hidden_states
    assert len(ours) == len(theirs) == 4
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_hidden_states_by_configuration_and_in_a_tuple():
    model = make_model()
    with torch.no_grad():
        assert model(IDS, pixels(2)).hidden_states is None
        states = model(IDS, pixels(2), output_hidden_states=True).hidden_states
        assert [tuple(state.shape) for state in states] == [(2, 6, 32)] * 4
        found = model(
            IDS,
            pixels(2),
            labels=LABELS,
            use_cache=True,
            output_hidden_states=True,
            return_dict=False,
        )
        assert [type(x).__name__ for x in found] == ["Tensor", "Tensor", "DattnCache", "tuple"]
        assert torch.equal(found[1], model.lm_head(states[-1]))
        model.config.output_hidden_states = True
        assert len(model(IDS, pixels(2)).hidden_states) == 4
        model.config.return_dict = False
        assert isinstance(model(IDS, pixels(2)), tuple)


@pytest.mark.parametrize("name", ["past_key_values", "cache", "kv_store_of_some_later_release"])
@pytest.mark.parametrize("make", [DattnCache, DynamicCache])
def test_the_cache_is_one_by_its_type(name, make):
    """A release may call it what it likes, and make one of its own."""
    model = make_model()
    whole = logits(model, IDS, pixels(2))
    with torch.no_grad():
        first = model(IDS[:, :5], pixels(2), **{name: make()}, use_cache=True)
        cache = first[cache_field()]
        assert isinstance(cache, DattnCache)
        second = model(IDS[:, 5:], **{name: cache}, use_cache=True)
    assert second[cache_field()] is cache and cache.get_seq_length() == 6
    torch.testing.assert_close(second.logits, whole[:, 5:], atol=2e-5, rtol=0)


def test_a_replaced_cache_is_not_taken_for_an_empty_one():
    """It looks empty, and the step would read one token and no image."""
    model, cache = make_model(), DynamicCache(config=make_model().config.text_config)
    model(IDS[:, :5], pixels(2), past_key_values=cache)
    refused(model, "was replaced by the DattnCache", IDS[:, 5:], 0, past_key_values=cache)


def test_caches_of_other_kinds_are_refused():
    model = make_model()
    static = StaticCache(config=model.config.text_config, max_cache_len=20)
    refused(model, "the cache is a StaticCache; .*pass a DattnCache", past_key_values=static)
    filled = DynamicCache()
    filled.update(torch.zeros(2, 2, 3, 8), torch.zeros(2, 2, 3, 8), 0)
    refused(model, "filled by another model", past_key_values=filled)
    refused(model, "the cache is a tuple", past_key_values=((1, 2),))
    refused(model, "2 caches", past_key_values=DattnCache(), other=DattnCache())
    refused(model, "use_cache is False", past_key_values=DattnCache(), use_cache=False)
    offloaded = DynamicCache()
    offloaded.offloading = True
    refused(model, "offloaded", past_key_values=offloaded)
    cache = DattnCache()
    model(IDS, pixels(2), past_key_values=cache)
    refused(model, "holds 2 samples, but input_ids 1", IDS[:1, :2], 0, past_key_values=cache)


def test_the_field_of_the_cache_is_found_or_named():
    def output(*names):
        return make_dataclass("Output", [(name, object, None) for name in names])

    known = ("loss", "logits", "hidden_states", "attentions")
    assert cache_field() in ("past_key_values", "cache")
    assert cache_field(output(*known, "kv")) == "kv"
    for names in (known, (*known, "kv", "states")):
        with pytest.raises(RuntimeError, match="Output has the fields loss.*tested with"):
            cache_field(output(*names))
    assert issubclass(DattnCache, Cache)


def test_pixels():
    model = make_model()
    for message, values in {
        "pixel_values are list": [pixels(2)],
        r"pixel_values are of shape \[3, 12, 12\]": pixels(2)[0],
    }.items():
        refused(model, message, IDS, 0, pixel_values=values)
        with pytest.raises(ValueError, match=message):
            model.generate(input_ids=IDS, pixel_values=values, max_new_tokens=2)


def test_masks():
    model = make_model()
    four = torch.ones(2, 1, 6, 6)
    refused(model, r"attention_mask is \[2, 1, 6, 6\]; it must be", attention_mask=four)
    refused(model, r"attention_mask is \[2, 5\]", attention_mask=torch.ones(2, 5))
    refused(model, "attention_mask is dict", attention_mask={"full_attention": four})
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    cache = DattnCache()
    model(IDS[:, :5], pixels(2), mask[:, :5], past_key_values=cache)
    refused(
        model,
        "differs from the one that the cached columns",
        IDS[:, 5:],
        0,
        attention_mask=torch.ones(2, 6),
        past_key_values=cache,
    )


def test_a_mask_that_is_added_to_scores_is_refused():
    """Read as 0 and 1 it would hide the tokens, and show the padding."""
    model = make_model()
    added = torch.tensor([[float("-inf"), 0, 0, 0, 0, 0], [0] * 6])
    refused(model, "other numbers than 0 and 1", attention_mask=added)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6])
    expected = logits(model, IDS, pixels(2), mask)
    for kind in (torch.bool, torch.float32, torch.bfloat16):
        assert torch.equal(logits(model, IDS, pixels(2), mask.to(kind)), expected)


def test_what_belongs_to_images_fits_them():
    model, grids = make_model(), torch.tensor([[1, 1]])
    refused(model, "image_grids come without pixel_values", TEXT, 0, image_grids=grids)
    columns = torch.zeros(2, 5, dtype=torch.bool)
    refused(model, r"image_columns have shape \[2, 5\], but", image_columns=columns)


def test_a_loop_by_hand_gets_the_cache_that_the_configuration_promises():
    """As with transformers' own models: nobody names use_cache, and step two sees the image."""
    model = make_model()
    whole = logits(model, IDS, pixels(2))
    with torch.no_grad():
        first = model(IDS[:, :5], pixels(2))
        second = model(IDS[:, 5:], past_key_values=first[cache_field()])
        torch.testing.assert_close(second.logits, whole[:, 5:], atol=2e-5, rtol=0)
        assert cache_field() not in model(IDS, pixels(2), labels=LABELS)
        model.config.text_config.use_cache = False
        assert cache_field() not in model(IDS, pixels(2))
        model.config.text_config.use_cache = True
        assert cache_field() not in model.train()(IDS, pixels(2))


def test_a_mask_of_the_new_columns_or_of_all():
    model = make_model()
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    whole = logits(model, IDS, pixels(2), mask)
    for later in (mask, mask[:, 5:], None):
        cache = DattnCache()
        logits(model, IDS[:, :5], pixels(2), mask[:, :5], past_key_values=cache)
        found = logits(model, IDS[:, 5:], attention_mask=later, past_key_values=cache)
        torch.testing.assert_close(found, whole[:, 5:], atol=2e-5, rtol=0)


def test_labels_and_a_part_of_the_logits():
    model = make_model()
    last = logits(model, IDS, pixels(2))[:, -2:]
    torch.testing.assert_close(logits(model, IDS, pixels(2), logits_to_keep=2), last)
    places = torch.tensor([4, 5])
    torch.testing.assert_close(logits(model, IDS, pixels(2), logits_to_keep=places), last)
    for keep in (2, places):
        refused(model, "labels or logits_to_keep, not both", labels=LABELS, logits_to_keep=keep)
    refused(model, "logits_to_keep is -1", logits_to_keep=-1)
    refused(model, r"labels have shape \[2, 5\]", labels=LABELS[:, :5])


def test_labels_at_images_and_padding_do_not_count():
    """Labels are often a copy of the ids."""
    model = make_model()
    ids = torch.tensor([[0, 0, 1, 5, IMAGE, 7, 8]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    masked = ids.masked_fill((ids == IMAGE) | (mask == 0), -100)
    with torch.no_grad():
        losses = [model(ids, pixels(1), mask, labels=labels).loss for labels in (ids, masked)]
    assert torch.equal(*losses)
    wrong = masked.clone()
    wrong[0, -1] = 50
    refused(model, "labels hold token 50.*50 tokens", ids, 1, attention_mask=mask, labels=wrong)


def test_a_loss_beside_a_cache():
    """The rows that follow on a cache have a loss of their own."""
    model, labels = make_model(), TEXT.clone()
    with torch.no_grad():
        whole = model(TEXT).logits[0]
        start = model(TEXT[:, :4], use_cache=True, return_dict=False)[-1]
        mask = torch.ones_like(TEXT)
        found = model(TEXT[:, 4:], None, mask, start, labels[:, 4:]).loss
    expected = torch.nn.functional.cross_entropy(whole[4:-1], TEXT[0, 5:])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
def test_a_cache_is_not_filled_twice():
    """Gradient checkpointing runs each layer again in the backward pass."""
    model = make_model().train()
    model.gradient_checkpointing_enable()
    refused(model, "runs each layer twice", use_cache=True)
    expected = logits(make_model(), IDS, pixels(2))
    torch.testing.assert_close(logits(model, IDS, pixels(2), use_cache=True), expected)
