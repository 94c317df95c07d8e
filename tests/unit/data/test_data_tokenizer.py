"""Tokenizers: both kinds behind one interface, and what a wrong path says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dattn_mcore.data.templates import encode_conversation, encode_sample
from dattn_mcore.data.tokenizer import (
    CHAT_SYMBOLS,
    NEW_SYMBOLS,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    train_tokenizer,
)
from dattn_mcore.errors import DataError


def test_trained_tokenizer_has_the_fixed_ids(toy_tokenizer: SentencePieceTokenizer) -> None:
    assert (toy_tokenizer.bos_id, toy_tokenizer.eos_id) == (1, 2)
    assert [toy_tokenizer.special_id(name) for name in NEW_SYMBOLS] == [4, 5, 6, 7]
    assert toy_tokenizer.vocab_size <= 320
    assert toy_tokenizer.prefix_space is False
    assert len(toy_tokenizer.encode("0123456789")) == 10


def test_training_is_deterministic(tmp_path: Path) -> None:
    texts = ["Which digit is in the cell?", "7 8 9"]
    train_tokenizer(texts, tmp_path / "a")
    train_tokenizer(texts, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_survives_encoding(toy_tokenizer: SentencePieceTokenizer, text: str) -> None:
    if "\u2581" in text or "\0" in text:
        return  # SentencePiece's own space symbol reads back as a space; NUL ends its strings
    ids = toy_tokenizer.encode(text)
    assert toy_tokenizer.decode(ids) == text
    assert all(8 <= i < toy_tokenizer.vocab_size for i in ids)  # no special id, no unk


def test_prefix_space_of_a_llama_like_file_is_known_and_not_added(tmp_path: Path) -> None:
    corpus = tmp_path / "c.txt"
    corpus.write_text("Which digit is in the cell\n" * 3)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "m"),
        vocab_size=300,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    tokenizer = load_tokenizer(tmp_path / "m.model")
    assert tokenizer.prefix_space is True
    assert tokenizer.decode(tokenizer.encode("digit")) == "digit"
    assert tokenizer.encode(" digit") != tokenizer.encode("digit")
    plain = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    assert tokenizer.encode(" digit is") == plain.encode("digit is")
    # A caption starts as the tokenizer starts a text.
    sample = encode_sample(encode_conversation(tokenizer, "plain", ["", "digit is"]), 1)
    assert list(sample.text_ids) == [1, *plain.encode("digit is"), 2]
    with pytest.raises(DataError, match=r"no token '\[INST\]', which data.template needs"):
        encode_conversation(tokenizer, "mistral", ["a", "b"])


def _save(tokenizer: Tokenizer, folder: Path, **special: str) -> Path:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.add_special_tokens({"additional_special_tokens": list(CHAT_SYMBOLS)})
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def byte_level_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-like tokenizer folder: byte level, no prefix space."""
    vocab = {"<s>": 0, "</s>": 1}
    for letter in pre_tokenizers.ByteLevel.alphabet():
        vocab[letter] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("byte_level")
    return _save(tokenizer, folder, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def metaspace_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mistral-like tokenizer folder: a space in front of a text, not after a special token."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for piece in "\u2581abcdefghijklmnopqrstuvwxyz7":
        vocab[piece] = len(vocab)
    vocab["\u2581a"] = len(vocab)
    model = models.BPE(
        vocab=vocab, merges=[("\u2581", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    folder = tmp_path_factory.mktemp("metaspace")
    return _save(tokenizer, folder, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("kind", ["byte_level_folder", "metaspace_folder"])
def test_hugging_face_folder(kind: str, request: pytest.FixtureRequest) -> None:
    tokenizer = load_tokenizer(request.getfixturevalue(kind))
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert tokenizer.prefix_space is (kind == "metaspace_folder")
    assert tokenizer.special_id("[INST]") < tokenizer.vocab_size
    for text in ("a b", " a", "a", "\na", "</s>[INST] a", "é"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.bos_id not in ids
        assert tokenizer.eos_id not in ids
        assert tokenizer.special_id("[INST]") not in ids
    assert tokenizer.encode("") == []
    # Ids of a template are those of the whole string.
    whole = tokenizer._model.encode("<s>[INST] a b[/INST] 7 a</s>", add_special_tokens=False)
    sample = encode_sample(encode_conversation(tokenizer, "mistral", ["a b", "7 a"]), 1)
    assert list(sample.text_ids) == whole


def test_mistral_caption_starts_with_a_space(metaspace_folder: Path) -> None:
    tokenizer = load_tokenizer(metaspace_folder)
    sample = encode_sample(encode_conversation(tokenizer, "plain", ["", "a b"]), 1)
    whole = tokenizer._model.encode("a b", add_special_tokens=False)
    assert list(sample.text_ids[1:-1]) == whole


def test_fingerprints_differ_by_content_only(byte_level_folder: Path, toy_model: Path) -> None:
    one = load_tokenizer(byte_level_folder)
    (byte_level_folder / "model.safetensors").write_bytes(b"weights may lie beside it")
    assert load_tokenizer(byte_level_folder).fingerprint == one.fingerprint
    assert load_tokenizer(toy_model).fingerprint != one.fingerprint


def test_folder_with_only_a_sentencepiece_file(toy_model: Path) -> None:
    assert isinstance(load_tokenizer(toy_model.parent), SentencePieceTokenizer)


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.tokenizer: '.*nowhere' does not exist; give"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "bad.model").write_bytes(b"this is no model")
    with pytest.raises(DataError, match="is not a SentencePiece model"):
        load_tokenizer(tmp_path / "bad.model")
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # Tiktoken's, as Llama 3 has
    with pytest.raises(DataError, match=r"Tiktoken .* give a Hugging Face folder") as raised:
        load_tokenizer(tmp_path / "tokenizer.model")
    assert "\n" not in str(raised.value)
    (tmp_path / "empty.model").write_bytes(b"")
    with pytest.raises(DataError, match="is not a SentencePiece model"):
        load_tokenizer(tmp_path / "empty.model")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps({"nothing": 1}))
    with pytest.raises(DataError, match="is not a Hugging Face tokenizer folder") as raised:
        load_tokenizer(folder)
    assert "\n" not in str(raised.value)
