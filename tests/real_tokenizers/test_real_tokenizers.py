"""Chat templates on the tokenizers of published models, against their makers' own code.

Ids for training and of the exported Jinja are those of mistral-common's `encode_chat_completion`, of
llama-models' `ChatFormat`, and of Qwen's ChatML by dashscope's tokenizer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from dattn_mcore.architectures import chat_templates
from dattn_mcore.data.templates import check_symbols, encode_conversation, encode_sample, stop_id
from dattn_mcore.data.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer
from dattn_mcore.errors import DataError
from tests.installed import Unavailable
from tests.real_tokenizers.packages import ask
from tools.checkpoint_convert.chat_templates import chat_template
from tools.checkpoint_convert.tokenizers_out import from_sentencepiece, messages

# Template of each oracle.
TEMPLATES = {
    "mistral_v2": "mistral",
    "mistral_v3": "mistral",
    "llama3": "llama3",
    "qwen_chatml": "chatml",
    "qwen3": "qwen3",
}
if "mistral_tekken" in chat_templates():
    TEMPLATES["mistral_tekken"] = "mistral_tekken"
# Templates that no package's code writes.
NO_ORACLE = {
    "plain": "image and caption, which is nobody's chat",
    "gemma": "Gemma's tokenizer is in no package",
    "olmo2": "OLMo 2's tokenizer is in no package",
    "smollm3": "SmolLM3's tokenizer is in no package",
}
# Mistral's own puts a system message in front of the last user's turn, this project in front of the
# first, which all answers can see (architectures/language/mistral.py): compared where both are one.
SYSTEM_WITH_ONE_TURN = ("mistral_v2", "mistral_v3")
PIECES = (
    "What is in the picture",
    "the top-left cell",
    " 40,971",
    "\n",
    "\n\n",
    "  two  spaces",
    "\t",
    "naïve café",
    "漢字かな",
    "Привет, мир",
    "שלום",
    "🙂👩‍🚀",
    "e\u0301",
    "'s they'll",
    "?!…",
    "x = [1, 2]",
    "def f(a):\n    return a",
    "http://a.b/c?d=1",
    "ABCdefGHI",
    "1234567",
    " a",
    "—",
    "ﬁ",
    "''",
)


@dataclass
class Real:
    """A real tokenizer and its maker's ids.

    Attributes:
        name: of the oracle.
        template: of this project.
        conversations: what was asked.
        ids: of each, by the maker's code.
        tokenizer: as a run opens it.
    """

    name: str
    template: str
    conversations: list[dict[str, Any]]
    ids: list[list[int]]
    tokenizer: Tokenizer


def said(draw: random.Random) -> str:
    text = "".join(draw.choices(PIECES, k=draw.randint(1, 6))).strip()
    return text or "a"


def conversations(name: str) -> list[dict[str, Any]]:
    """Of one to six turns, some with a system message."""
    draw = random.Random(7)
    found = []
    for number in range(240):
        turns = [said(draw) for _ in range(1 + number % 6)]
        system = said(draw) if number % 4 == 0 else ""
        if name in SYSTEM_WITH_ONE_TURN and len(turns) > 2:
            system = ""
        found.append({"system": system, "turns": turns})
    return found


def asked(name: str, work: Path, what: list[dict[str, Any]]) -> dict[str, Any]:
    try:
        return ask(name, work, what)
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=TEMPLATES)
def real(request, tmp_path_factory) -> Real:
    name, work = request.param, tmp_path_factory.mktemp(request.param)
    what = conversations(name)
    answer = asked(name, work, what)
    tokenizer = load_tokenizer(answer["tokenizer"])
    return Real(name, TEMPLATES[name], what, answer["ids"], tokenizer)


def test_ids_for_training_are_the_makers(real):
    for one, expected in zip(real.conversations, real.ids, strict=True):
        runs = encode_conversation(real.tokenizer, real.template, one["turns"], one["system"])
        assert list(encode_sample(runs, 1).text_ids) == expected, one
    assert len({tuple(ids) for ids in real.ids}) > 200


def test_ids_of_the_exported_template_are_the_makers(real):
    """The Jinja text that an export carries, by the tokenizer that it carries."""
    tokenizer = real.tokenizer
    if isinstance(tokenizer, SentencePieceTokenizer):
        exported: Any = from_sentencepiece(tokenizer.path)
    else:
        exported = AutoTokenizer.from_pretrained(tokenizer.path)
    jinja = chat_template(real.template, tokenizer.prefix_space)
    for one, expected in zip(real.conversations, real.ids, strict=True):
        text = exported.apply_chat_template(
            messages(one["turns"], one["system"]), chat_template=jinja, tokenize=False
        )
        assert exported.encode(text, add_special_tokens=False) == expected, one


def test_what_is_learned_is_what_was_answered(real):
    """Labels are each answer's own ids and the token that ends it, and spell the answers."""
    stop = stop_id(real.tokenizer, real.template)
    for one in real.conversations:
        runs = encode_conversation(real.tokenizer, real.template, one["turns"], one["system"])
        labels = [label for label in encode_sample(runs, 1).labels if label != -100]
        answers: list[list[int]] = [[]]
        for label in labels:
            if label == stop:
                answers.append([])
            else:
                answers[-1].append(label)
        assert answers.pop() == []
        composed = [real.tokenizer.decode(answer).strip() for answer in answers]
        assert len(composed) == len(one["turns"]) // 2
        if real.template in ("mistral", "llama3", "mistral_tekken"):  # Qwen's composes accents
            assert composed == one["turns"][1::2]


@pytest.mark.parametrize("change", ["space", "newline", "token"])
def test_another_template_would_be_seen(real, change):
    """The comparison is no empty one: conversations differ by one id where the text does."""
    one, expected = real.conversations[1], real.ids[1]
    changed = {
        "space": [one["turns"][0] + " .", *one["turns"][1:]],
        "newline": [one["turns"][0] + "\n.", *one["turns"][1:]],
        "token": [*one["turns"], "."],
    }[change]
    runs = encode_conversation(real.tokenizer, real.template, changed, one["system"])
    assert list(encode_sample(runs, 1).text_ids) != expected


def test_version_1_lacks_the_tokens_of_turns(real_mistral_v1):
    with pytest.raises(DataError, match=r"has no token '\[INST\]', which data.template needs"):
        check_symbols(load_tokenizer(real_mistral_v1), "mistral")


@pytest.fixture
def real_mistral_v1(tmp_path) -> str:
    return str(asked("mistral_v1", tmp_path, [])["tokenizer"])


def test_every_template_has_an_oracle_or_a_reason():
    assert set(chat_templates()) <= set(TEMPLATES.values()) | set(NO_ORACLE)
    assert not set(TEMPLATES.values()) & set(NO_ORACLE)
