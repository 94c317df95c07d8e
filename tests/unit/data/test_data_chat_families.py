"""Templates of families whose tokenizers are byte-level BPE, some without a first token.

Ids are compared with transformers' of the models' own chat templates (without tools and dates).
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dattn_mcore.architectures import chat_templates
from dattn_mcore.data.templates import encode_conversation, encode_sample, stop_id
from dattn_mcore.data.tokenizer import HuggingFaceTokenizer, load_tokenizer
from tools.checkpoint_convert.chat_templates import chat_template
from tools.checkpoint_convert.tokenizers_out import messages

# Source: tokenizer_config.json of Qwen/Qwen2.5-7B-Instruct and Qwen/Qwen3-8B (thinking off), and
# meta-llama/Meta-Llama-3-8B-Instruct; chat_template.jinja of HuggingFaceTB/SmolLM3-3B;
# tokenizer_config.json of allenai/OLMo-2-1124-7B-Instruct; what mistral-common writes (InstructTokenizerV7 and V13, without
# tools).
_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OWN = {
    "chatml": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Qwen, created by Alibaba "
        "Cloud. You are a helpful assistant.<|im_end|>\n{% endif %}" + _CHATML
    ),
    "qwen3": (
        "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if loop.index0 > ns.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ m.content + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}"
    ),
    "smollm3": (  # with /system_override, /no_think
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' %}{{ '<think>\n\n</think>\n' }}{% endif %}"
        "{{ m.content + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant\n<think>\n\n</think>\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim"
        " + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "olmo2": (  # with the new line that is left out behind the last answer
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
    "mistral_tekken": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
        "{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}{% elif m.role == 'user' %}"
        "{{ '[INST]' + m.content + '[/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}"
        "{% endfor %}"
    ),
}
# How a text is cut before merging; source: tokenizer.json of Qwen2.5 (Llama 3's differs in numbers).
# Newlines stay together whatever follows, so that a segment may end with them.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FIRST = {
    "chatml": None,
    "qwen3": None,
    "smollm3": None,
    "olmo2": "<|endoftext|>",
    "llama3": "<|begin_of_text|>",
    "mistral_tekken": "<s>",
}
END = {
    "chatml": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "smollm3": "<|im_end|>",
    "olmo2": "<|endoftext|>",
    "llama3": "<|end_of_text|>",
    "mistral_tekken": "</s>",
}


@pytest.fixture(scope="module", params=sorted(OWN))
def template(request: pytest.FixtureRequest) -> str:
    return request.param


def make_byte_level(folder: Path, template: str) -> Path:
    """A byte-level tokenizer folder with merges over newlines, as these families have."""
    vocab: dict[str, int] = {}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[letter] = len(vocab)
    merges = [("Ċ", "Ċ"), ("d", "i"), ("di", "g"), ("u", "s")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    first = {"bos_token": FIRST[template]} if FIRST[template] else {}
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END[template], **first)
    for name in chat_templates()[template].tokens():
        # As in Qwen3's, the marks of a thought are no special tokens.
        thought = "think" in name
        fast.add_tokens([AddedToken(name, special=not thought, normalized=False)], not thought)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(template: str, tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTokenizer:
    opened = load_tokenizer(make_byte_level(tmp_path_factory.mktemp(template), template))
    assert isinstance(opened, HuggingFaceTokenizer)
    return opened


SAID = st.text(st.sampled_from("digits\n us.789é漢"), min_size=1, max_size=20).map(str.strip)


@settings(max_examples=60, deadline=None)
@given(turns=st.lists(SAID.filter(bool), min_size=1, max_size=5), system=SAID)
def test_ids_are_those_of_the_models_own_template(template, tokenizer, turns, system):
    spoken = messages(turns, system)
    own, exported = OWN[template], chat_template(template, prefix_space=False)
    backend = tokenizer._model
    asks = len(turns) % 2 == 1
    expected = backend.apply_chat_template(
        spoken, chat_template=own, add_generation_prompt=asks, return_dict=False
    )
    ids = encode_sample(encode_conversation(tokenizer, template, turns, system), 16).text_ids
    assert list(ids) == list(expected)
    text = backend.apply_chat_template(spoken, chat_template=exported, tokenize=False)
    assert backend.encode(text, add_special_tokens=False) == list(expected)


def test_loss_is_on_answers_and_what_ends_them(template, tokenizer):
    sample = encode_sample(encode_conversation(tokenizer, template, ["q", "7", "us", "digit"]), 1)
    predicted = [label for label in sample.labels if label != -100]
    stop = stop_id(tokenizer, template)
    expected = [*tokenizer.encode("7"), stop, *tokenizer.encode("digit"), stop]
    assert predicted == expected


def test_a_caption_begins_with_a_token_that_can_predict_it(template, tokenizer):
    sample = encode_sample(encode_conversation(tokenizer, "plain", ["<image>", "7"]), 4)
    first = tokenizer.bos_id if FIRST[template] else tokenizer.eos_id
    assert sample.text_ids == (first, *tokenizer.encode("7"), tokenizer.eos_id)
    assert sample.labels[0] == sample.text_ids[1]
    assert tokenizer.has_bos is bool(FIRST[template])
