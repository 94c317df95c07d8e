"""Templates: exact ids, where the loss is, and equality with Hugging Face's tokenisation."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError

from dattn_mcore.data.templates import (
    EncodedSample,
    ImageRun,
    TextRun,
    encode_conversation,
    encode_sample,
    merge_runs,
    stop_id,
    truncate,
)
from dattn_mcore.data.tokenizer import SentencePieceTokenizer
from dattn_mcore.errors import ConfigError, DataError
from tools.checkpoint_convert.chat_templates import chat_template

CHAT = {
    "mistral": (
        "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }}[/INST]"
        "{% else %} {{ m.content | trim }}</s>{% endif %}{% endfor %}"
    ),
    "gemma": (
        "<s>{% for m in messages %}<start_of_turn>{{ 'user' if m.role == 'user' else 'model' }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
}


def _spell(tokenizer: SentencePieceTokenizer, sample: EncodedSample) -> str:
    """The ids as one string of pieces, special ones included."""
    return "".join(tokenizer._model.id_to_piece(i) for i in sample.text_ids).replace("\u2581", " ")


def _predicted(tokenizer: SentencePieceTokenizer, sample: EncodedSample) -> str:
    """What the labels ask for, as one string of pieces."""
    ids = [label for label in sample.labels if label != -100]
    return "".join(tokenizer._model.id_to_piece(i) for i in ids).replace("\u2581", " ")


# Where the models' own chat templates put a system turn. Mistral-7B-Instruct-v0.3 puts it into the
# last turn if that is a user's, so nowhere before an answer: they agree where one question is asked.
# Gemma 2 refuses one; Gemma 3 puts it into the first user turn.
OWN_SYSTEM = {
    "mistral": (
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
        "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}"
        "<s>{% for m in turns %}{% if m.role == 'user' %}[INST] "
        "{% if loop.last and system is defined %}{{ system + '\n\n' }}{% endif %}"
        "{{ m.content }}[/INST]{% else %} {{ m.content | trim }}</s>{% endif %}{% endfor %}"
    ),
    "gemma": (
        "{% if messages[0].role == 'system' %}{% set prefix = messages[0].content + '\n\n' %}"
        "{% set turns = messages[1:] %}{% else %}{% set prefix = '' %}{% set turns = messages %}"
        "{% endif %}<s>{% for m in turns %}<start_of_turn>"
        "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ prefix if loop.first else '' }}"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
}


TURNS = ["<image>\nWhich digit?", "7", "in the cell?", "9"]


def test_mistral(toy_tokenizer: SentencePieceTokenizer) -> None:
    sample = encode_sample(encode_conversation(toy_tokenizer, "mistral", TURNS), 16)
    assert _spell(toy_tokenizer, sample) == (
        "<s>[INST] \nWhich digit?[/INST] 7</s>[INST] in the cell?[/INST] 9</s>"
    )
    assert _predicted(toy_tokenizer, sample) == " 7</s> 9</s>"
    # <s> [INST] and one space stand before the image.
    assert sample.layout == ((False, 3), (True, 16), (False, len(sample.text_ids) - 3))
    assert stop_id(toy_tokenizer, "mistral") == toy_tokenizer.eos_id


def test_gemma(toy_tokenizer: SentencePieceTokenizer) -> None:
    sample = encode_sample(encode_conversation(toy_tokenizer, "gemma", TURNS), 16)
    assert _spell(toy_tokenizer, sample) == (
        "<s><start_of_turn>user\n\nWhich digit?<end_of_turn>\n<start_of_turn>model\n7<end_of_turn>\n"
        "<start_of_turn>user\nin the cell?<end_of_turn>\n<start_of_turn>model\n9<end_of_turn>\n"
    )
    assert _predicted(toy_tokenizer, sample) == "7<end_of_turn>9<end_of_turn>"
    assert stop_id(toy_tokenizer, "gemma") == toy_tokenizer.special_id("<end_of_turn>")


def test_plain_puts_images_before_bos_and_drops_the_question(
    toy_tokenizer: SentencePieceTokenizer,
) -> None:
    runs = encode_conversation(toy_tokenizer, "plain", ["Read <image> and <image>.", "1 2"])
    assert runs[:2] == (ImageRun(), ImageRun())
    sample = encode_sample(runs, 16)
    assert _spell(toy_tokenizer, sample) == "<s>1 2</s>"
    assert _predicted(toy_tokenizer, sample) == "1 2</s>"
    assert sample.layout == ((True, 32), (False, len(sample.text_ids)))
    assert sample.labels[0] == sample.text_ids[1]  # the <bos> row predicts the first token
    assert sample.num_images == 2


@pytest.mark.parametrize("template", ["plain", "mistral", "gemma"])
def test_labels_are_the_next_text_row_or_nothing(
    toy_tokenizer: SentencePieceTokenizer, template: str
) -> None:
    sample = encode_sample(encode_conversation(toy_tokenizer, template, TURNS[:2]), 16)
    assert len(sample.labels) == len(sample.text_ids)
    assert sample.labels[-1] == -100
    for row, label in enumerate(sample.labels[:-1]):
        assert label in (-100, sample.text_ids[row + 1])


@pytest.mark.parametrize("template", ["plain", "mistral", "gemma"])
def test_a_prompt_is_the_beginning_of_its_sample(
    toy_tokenizer: SentencePieceTokenizer, template: str
) -> None:
    turns = TURNS[:2] if template == "plain" else TURNS
    whole = encode_sample(encode_conversation(toy_tokenizer, template, turns), 16)
    prompt = encode_sample(encode_conversation(toy_tokenizer, template, turns[:-1]), 16)
    size = len(prompt.text_ids)
    assert whole.text_ids[:size] == prompt.text_ids
    # The row after the prompt is the first that is predicted in the last turn.
    assert whole.labels[size - 1] == whole.text_ids[size]


def test_images_stay_where_they_stand(toy_tokenizer: SentencePieceTokenizer) -> None:
    runs = encode_conversation(toy_tokenizer, "mistral", ["a <image> b <image>", "7"])
    kinds = [type(run) for run in runs]
    assert kinds == [TextRun, ImageRun, TextRun, ImageRun, TextRun]
    first, second = runs[0], runs[2]
    assert isinstance(first, TextRun) and isinstance(second, TextRun)
    assert toy_tokenizer.decode(first.ids) == " a "
    assert toy_tokenizer.decode(second.ids) == " b "


def test_neighbouring_images_are_one_visual_run(toy_tokenizer: SentencePieceTokenizer) -> None:
    sample = encode_sample(encode_conversation(toy_tokenizer, "gemma", ["<image><image>", "7"]), 9)
    assert [rows for is_visual, rows in sample.layout if is_visual] == [18]
    assert merge_runs([(False, 1), (False, 2), (True, 3)]) == ((False, 3), (True, 3))


def test_outer_white_space_of_turns_is_dropped(toy_tokenizer: SentencePieceTokenizer) -> None:
    for template in ("mistral", "gemma"):
        tidy = encode_conversation(toy_tokenizer, template, ["<image>\nq", "7"])
        assert encode_conversation(toy_tokenizer, template, [" <image>\nq\n", "\n7  "]) == tidy


def test_spelled_special_tokens_stay_text(toy_tokenizer: SentencePieceTokenizer) -> None:
    said = "end </s> [INST] <end_of_turn> <s>"
    for template in ("mistral", "gemma"):
        plain = encode_sample(encode_conversation(toy_tokenizer, template, ["q", "7"]), 1)
        tricky = encode_sample(encode_conversation(toy_tokenizer, template, [said, said]), 1)
        for special in range(8):  # unk, bos, eos, pad and the chat symbols
            assert tricky.text_ids.count(special) == plain.text_ids.count(special)
        assert toy_tokenizer.decode(tricky.text_ids).count(said) == 2


def test_truncation_cuts_text_and_the_images_behind_the_cut(
    toy_tokenizer: SentencePieceTokenizer,
) -> None:
    turns = ["<image> a b c d", "7", "<image> e f g h", "9"]
    sample = encode_sample(encode_conversation(toy_tokenizer, "mistral", turns), 16)
    assert truncate(sample, len(sample.text_ids)) is sample
    second = sample.layout[2][1] + sample.layout[0][1]  # text rows before the second image
    short = truncate(sample, second)
    assert short.layout == sample.layout[:3]
    assert (short.num_images, short.visual_rows) == (1, 16)
    assert short.text_ids == sample.text_ids[:second]
    assert short.labels[:-1] == sample.labels[: second - 1]
    assert short.labels[-1] == -100
    longer = truncate(sample, second + 1)
    assert longer.num_images == 2
    assert longer.layout[-1] == (False, 1)


def test_mistakes(toy_tokenizer: SentencePieceTokenizer) -> None:
    with pytest.raises(ConfigError, match="data.template: 'vicuna' is unknown; use plain"):
        encode_conversation(toy_tokenizer, "vicuna", ["a", "b"])
    with pytest.raises(DataError, match="at least one turn"):
        encode_conversation(toy_tokenizer, "mistral", [])
    with pytest.raises(DataError, match="one image caption pair, got 4 turns"):
        encode_conversation(toy_tokenizer, "plain", ["a", "b", "c", "d"])


WORDS = st.text(st.sampled_from("Which digit.?-\n789é漢"), min_size=1, max_size=20)


@pytest.fixture(scope="module")
def hugging_face(toy_model: Path, tmp_path_factory: pytest.TempPathFactory):
    """transformers' own reading of the same SentencePiece file."""
    from transformers import LlamaTokenizer

    folder = tmp_path_factory.mktemp("llama")
    shutil.copy(toy_model, folder / "tokenizer.model")
    return LlamaTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("template", ["mistral", "gemma"])
@settings(max_examples=60, deadline=None)
@given(turns=st.lists(WORDS, min_size=1, max_size=4))
def test_equals_the_hugging_face_chat_template(
    toy_tokenizer: SentencePieceTokenizer, hugging_face, template: str, turns: list[str]
) -> None:
    # SentencePiece and tokenizers break ties of equal merges alike only for the same input, so
    # the comparison is of the same pieces: the whole string there, segments here.
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    expected = hugging_face.apply_chat_template(
        messages,
        chat_template=CHAT[template],
        add_generation_prompt=len(turns) % 2 == 1,
        return_dict=False,
    )
    sample = encode_sample(encode_conversation(toy_tokenizer, template, turns), 16)
    assert list(sample.text_ids) == list(expected)


@pytest.mark.parametrize("template", ["mistral", "gemma"])
@settings(max_examples=30, deadline=None)
@given(
    system=WORDS.filter(str.strip), turns=st.lists(WORDS.filter(str.strip), min_size=1, max_size=4)
)
def test_a_system_turn_stands_where_the_models_own_template_puts_it(
    toy_tokenizer: SentencePieceTokenizer,
    hugging_face,
    template: str,
    system: str,
    turns: list[str],
) -> None:
    if template == "mistral":
        del turns[1:]
    roles = ("user", "assistant")
    messages = [{"role": "system", "content": system.strip()}]
    messages += [{"role": roles[i % 2], "content": turn.strip()} for i, turn in enumerate(turns)]
    own = {"add_generation_prompt": len(turns) % 2 == 1, "return_dict": False}
    expected = hugging_face.apply_chat_template(messages, chat_template=OWN_SYSTEM[template], **own)
    runs = encode_conversation(toy_tokenizer, template, turns, system)
    assert list(encode_sample(runs, 16).text_ids) == list(expected)
    exported = chat_template(template, False)
    text = hugging_face.apply_chat_template(messages, chat_template=exported, tokenize=False)
    assert hugging_face.encode(text, add_special_tokens=False) == list(expected)


@pytest.mark.parametrize("template", ["mistral", "gemma"])
def test_a_system_turn_is_read_before_every_answer(
    toy_tokenizer: SentencePieceTokenizer, template: str
) -> None:
    sample = encode_sample(encode_conversation(toy_tokenizer, template, TURNS, " Be short.\n"), 16)
    said = toy_tokenizer.decode(sample.text_ids)
    assert said.count("Be short.\n\n") == said.count("Be short.") == 1
    assert said.index("Be short.") < said.index("Which digit?")
    plain = encode_sample(encode_conversation(toy_tokenizer, template, TURNS), 16)
    assert _predicted(toy_tokenizer, sample) == _predicted(toy_tokenizer, plain)
    blank = encode_conversation(toy_tokenizer, template, TURNS, " \n")
    assert blank == encode_conversation(toy_tokenizer, template, TURNS)


SAID = {"role": "user", "content": "a"}
REFUSED = {
    "a second system turn": [
        {"role": "system", "content": "s"},
        {"role": "system", "content": "t"},
    ],
    "a system turn in the middle": [SAID, {"role": "system", "content": "s"}],
    "a tool": [SAID, {"role": "tool", "content": "3"}],
    "an image in it": [{"role": "system", "content": "<image>"}, SAID],
    "a video": [{"role": "user", "content": [{"type": "video", "text": "a"}]}],
}


@pytest.mark.parametrize("name", list(REFUSED))
@pytest.mark.parametrize("template", ["plain", "mistral", "gemma"])
def test_the_exported_template_refuses_what_it_has_no_place_for(
    hugging_face, template: str, name: str
) -> None:
    with pytest.raises(TemplateError, match="roles must alternate|<image>|text and image"):
        hugging_face.apply_chat_template(
            REFUSED[name], chat_template=chat_template(template, False), tokenize=False
        )
