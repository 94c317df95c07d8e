"""Every way of generating: it answers as plain greedy decoding does, or refuses in one line."""

import copy

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, MistralForCausalLM, StaticCache

from dattn_mcore.hf import DattnCache
from dattn_mcore.hf.arguments_dattn import cache_field
from dattn_mcore.hf.samples_dattn import by_sample, one_after_another
from tests.unit.hf.hf_models import IMAGE, VOCAB, make_model, pixels, text_config
from tests.unit.hf.test_hf_generate import IMAGES, LENGTH, PROMPTS, batch

SETTINGS = {"max_new_tokens": LENGTH, "min_new_tokens": LENGTH, "do_sample": False}
ONE = {"input_ids": torch.tensor([PROMPTS[0] * 2]), "pixel_values": pixels(4)}
TEXT = {"input_ids": torch.tensor([PROMPTS[2]])}


def beyond():
    """`make_model()` whose image token has no row in the vocabulary."""
    model = make_model()
    model.config.image_token_id = VOCAB
    return model


def moved(ids):
    return ids.masked_fill(ids == IMAGE, VOCAB)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_cache": False},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"repetition_penalty": 1.3, "use_cache": False},
    ],
)
def test_an_image_token_beyond_the_vocabulary(changes):
    """Scores of the prompt's tokens are looked up, and the image token has none."""
    settings = {**SETTINGS, "suppress_tokens": [IMAGE], **changes}
    inputs = batch()
    expected = make_model().generate(**inputs, **settings)
    inputs["input_ids"] = moved(inputs["input_ids"])
    found = beyond().generate(**inputs, **settings)
    assert torch.equal(found, moved(expected))
    output = beyond().generate(**inputs, **settings, return_dict_in_generate=True)
    assert torch.equal(output.sequences, found)


def test_guesses_with_an_image_token_beyond_the_vocabulary():
    """Prompt lookup takes what followed in the prompt as its guess, images too."""
    settings = {**SETTINGS, "suppress_tokens": [IMAGE]}
    expected = moved(make_model().generate(**ONE, **settings))
    inputs = {**ONE, "input_ids": moved(ONE["input_ids"])}
    found = beyond().generate(**inputs, **settings, prompt_lookup_num_tokens=3)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("seed", [0, 3])
def test_an_assistant(seed):
    """One that guesses right and one that does not; both see the images."""
    expected = make_model().generate(**ONE, **SETTINGS)
    assistant = make_model(seed=seed)
    seen = []
    assistant.model.vision_tower.register_forward_hook(lambda *_: seen.append(1))
    found = make_model().generate(**ONE, **SETTINGS, assistant_model=assistant)
    assert torch.equal(found, expected)
    assert seen


def test_an_assistant_with_an_image_token_beyond_the_vocabulary():
    settings = {**SETTINGS, "suppress_tokens": [IMAGE]}
    inputs = {**ONE, "input_ids": moved(ONE["input_ids"])}
    expected = beyond().generate(**inputs, **settings)
    for seed in (0, 3):
        assistant = make_model(seed=seed)
        assistant.config.image_token_id = VOCAB
        found = beyond().generate(**inputs, **settings, assistant_model=assistant)
        assert torch.equal(found, expected)


def test_an_assistant_that_sees_no_images():
    model = make_model()
    assistant = MistralForCausalLM(text_config("mistral")).eval()
    with pytest.raises(ValueError, match="MistralForCausalLM, which sees no images"):
        model.generate(**ONE, **SETTINGS, assistant_model=assistant)
    expected = model.generate(**TEXT, **SETTINGS)
    assert torch.equal(model.generate(**TEXT, **SETTINGS, assistant_model=assistant), expected)


def test_several_answers_to_each_sample():
    """Sampling from the one best token is greedy decoding, for each of a sample's answers."""
    model = make_model()
    expected = model.generate(**batch(), **SETTINGS)
    settings = {**SETTINGS, "do_sample": True, "top_k": 1, "num_return_sequences": 3}
    found = model.generate(**batch(), **settings)
    assert torch.equal(found, expected.repeat_interleave(3, dim=0))


@pytest.mark.parametrize(
    "kind", ["static", "hybrid", "offloaded", "offloaded_static", "quantized", "paged"]
)
def test_other_caches_are_refused(kind):
    model = make_model()
    message = f"cache_implementation is '{kind}'.*leave it out"
    with pytest.raises(ValueError, match=message):
        model.generate(**ONE, **SETTINGS, cache_implementation=kind)
    if kind in ("paged", "quantized", "offloaded_static"):
        return  # some releases know them as keyword only
    config = GenerationConfig(cache_implementation=kind, max_new_tokens=2)
    with pytest.raises(ValueError, match=message):
        model.generate(**ONE, generation_config=config)
    with pytest.raises(ValueError, match=message):
        model.generate(ONE["input_ids"], config, pixel_values=ONE["pixel_values"])
    model.generation_config.cache_implementation = kind
    with pytest.raises(ValueError, match=message):
        model.generate(**ONE, **SETTINGS)


def test_settings_that_cannot_be_honoured():
    model = make_model()
    static = StaticCache(config=model.config.text_config, max_cache_len=40)
    embedded = model.get_input_embeddings()(TEXT["input_ids"])
    for message, changes in {
        "the cache is a StaticCache": {cache_field(): static},
        "prefill_chunk_size": {"prefill_chunk_size": 2},
        "token_healing": {"token_healing": True},
        "output_attentions": {"output_attentions": True, "return_dict_in_generate": True},
        "inputs_embeds is not supported": {"inputs_embeds": embedded},
        "use_cache is False": {"use_cache": False, cache_field(): DattnCache()},
        "pixel_value'": {"pixel_value": 1},
        "4 image placeholders, but pixel_values hold 3": {"pixel_values": pixels(3)},
    }.items():
        with pytest.raises(ValueError, match=message):
            model.generate(**{**ONE, **SETTINGS, **changes})
    with pytest.raises(ValueError, match="continuous batching"):
        model.generate_batch([[1, 2, 3]])


@pytest.mark.parametrize(
    "changes", [{"prefill_chunk_size": 2}, {"cache_implementation": "dynamic"}]
)
def test_settings_that_change_no_answer(changes):
    model = make_model()
    expected = model.generate(**TEXT, **SETTINGS)
    assert torch.equal(model.generate(**TEXT, **SETTINGS, **changes), expected)


def test_hidden_states_of_every_step():
    output = make_model().generate(
        **ONE, **SETTINGS, output_hidden_states=True, return_dict_in_generate=True
    )
    columns = ONE["input_ids"].shape[1]
    shapes = [[tuple(state.shape) for state in step] for step in output.hidden_states]
    assert shapes == [[(1, columns, 32)] * 4] + [[(1, 1, 32)] * 4] * (LENGTH - 1)


def test_a_callers_cache_of_transformers_own():
    """Its first use is honoured; a second would read it as empty, and is refused."""
    model = make_model()
    expected = model.generate(**ONE, **SETTINGS)
    cache = DynamicCache(config=model.config.text_config)
    assert torch.equal(model.generate(**ONE, **SETTINGS, **{cache_field(): cache}), expected)
    with pytest.raises(ValueError, match="was replaced by the DattnCache"):
        model.generate(**ONE, **SETTINGS, **{cache_field(): cache})


@pytest.mark.parametrize("image_token", [IMAGE, VOCAB])
@pytest.mark.parametrize("t2v_position", ["none", "rope"])
def test_a_second_turn_through_generate(t2v_position, image_token):
    """With the whole chat's images or the new ones, the whole chat's ids or the new ones."""
    model = make_model(t2v_position=t2v_position)
    model.config.image_token_id = image_token
    settings = {**SETTINGS, "suppress_tokens": [0, IMAGE]}  # 0 is padding, of which masks are made
    cache = DattnCache()
    prompt = torch.tensor([PROMPTS[0]])
    prompt[prompt == IMAGE] = image_token
    first = {"input_ids": prompt, "pixel_values": pixels(2)}
    answer = model.generate(**first, **settings, **{cache_field(): cache})
    chat = torch.cat([answer, torch.tensor([[7, image_token, 8]])], dim=1)
    images, new = pixels(3), pixels(3)[2:]
    expected = model.generate(input_ids=chat, pixel_values=images, **settings)[:, -LENGTH:]
    mask, held = torch.ones_like(chat), cache.get_seq_length()
    assert held == chat.shape[1] - 4  # the last token of an answer is not read yet
    turns = {
        "all images": {"input_ids": chat, "pixel_values": images},
        "new images": {"input_ids": chat, "pixel_values": new},
        "all, masked": {"input_ids": chat, "pixel_values": images, "attention_mask": mask},
        "new ids": {"input_ids": chat[:, held:], "pixel_values": new, "attention_mask": mask},
    }
    for name, inputs in turns.items():
        copied = copy.deepcopy(cache)
        found = model.generate(**inputs, **settings, **{cache_field(): copied})
        assert torch.equal(found[:, -LENGTH:], expected), name


def test_the_cache_that_generate_returns_goes_on():
    model = make_model()
    output = model.generate(**ONE, **SETTINGS, return_dict_in_generate=True)
    cache = output[cache_field()]
    assert isinstance(cache, DattnCache)
    assert cache.get_seq_length() == output.sequences.shape[1] - 1


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_forward():
    """Whatever the compiler makes of it, the answer is the same."""
    model = make_model(text={"num_hidden_layers": 1})
    inputs = {"input_ids": torch.tensor([PROMPTS[1]]), "pixel_values": pixels(1)}
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    expected = model.generate(**inputs, **settings)
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(model.generate(**inputs, **settings), expected)


def test_samples_form_and_back():
    grids = torch.tensor([[2, 1], [1, 3], [0, 0], [2, 2], [0, 0]])
    counts = torch.tensor([2, 0, 3])
    tiles = pixels(int((1 + grids.prod(1)).sum()))
    values, padded = by_sample(tiles, grids, counts, torch.zeros(3, dtype=torch.long))
    assert values.shape[:2] == (3, 7) and padded.shape == (3, 3, 2)
    again, grids_again = one_after_another(values, padded, counts)
    assert torch.equal(again, tiles) and torch.equal(grids_again, grids)
    # Repeated along the first axis, as generation does it for beams, samples stay whole.
    repeated = one_after_another(
        values.repeat_interleave(2, 0), padded.repeat_interleave(2, 0), counts.repeat_interleave(2)
    )[0]
    assert torch.equal(repeated, torch.cat([tiles[:7], tiles[:7], tiles[7:], tiles[7:]]))
    # A sample's first images may be left out: a cache holds them.
    later, _ = by_sample(tiles, grids, counts, torch.tensor([1, 0, 2]))
    assert torch.equal(later[0, :4], tiles[3:7]) and torch.equal(later[2, :1], tiles[-1:])
    with pytest.raises(ValueError, match=r"\[2, 0, 2\] image placeholders a sample.*\[2, 0, 3\]"):
        one_after_another(values, padded, torch.tensor([2, 0, 2]))
    with pytest.raises(ValueError, match=r"image_grids must be \[3, most images, 2\]"):
        one_after_another(values, None, counts)


def test_a_batch_in_the_samples_form():
    """It is what generation passes; a caller may too."""
    model = make_model()
    inputs = batch()
    values, grids = by_sample(
        inputs["pixel_values"], None, torch.tensor(IMAGES), torch.zeros(3, dtype=torch.long)
    )
    with torch.no_grad():
        expected = model(**inputs).logits
        found = model(**{**inputs, "pixel_values": values}, image_grids=grids).logits
    assert torch.equal(found, expected)
