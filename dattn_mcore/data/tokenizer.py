"""Text to ids: one small interface over SentencePiece files and Hugging Face tokenizer folders.

`encode` is literal: the ids of exactly this text as it stands after a special token. No space is
put in front, nothing is stripped, and no special token ever comes out of it, also where the text
spells one (a user who writes "</s>" ends no turn). Special tokens are ids that templates place.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from dattn_mcore.architectures import chat_templates
from dattn_mcore.errors import DataError
from dattn_mcore.hf import NO_FOREIGN_CODE

# Special tokens of all templates.
CHAT_SYMBOLS = tuple(
    dict.fromkeys(name for chat in chat_templates().values() for name in chat.tokens())
)
# Those of a new tokenizer, in the order of their ids.
NEW_SYMBOLS = ("[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>")


class Tokenizer(Protocol):
    """What templates and pipelines need of a tokenizer.

    Attributes:
        path: File or folder that it was read from.
        bos_id: Id of the token that starts a sample; where there is none (`has_bos`), the one that
            ends an answer, since a caption's first token can only be predicted by a token.
        has_bos: Whether the tokenizer has a token that starts a sample.
        eos_id: Id of the token that ends an answer.
        vocab_size: Number of ids, added tokens included.
        prefix_space: Whether the tokenizer normally puts a space in front of a text (Mistral and
            Llama do, Gemma does not).
        fingerprint: SHA-256 of what defines it.
    """

    path: Path
    bos_id: int
    has_bos: bool
    eos_id: int
    vocab_size: int
    prefix_space: bool
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, literally."""

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`; special tokens are left out."""

    def special_id(self, name: str) -> int:
        """Returns the id of a special token by its spelling.

        Raises:
            DataError: The tokenizer has no such special token.
        """


def load_tokenizer(path: str | Path, setting: str = "data.tokenizer") -> Tokenizer:
    """Opens a SentencePiece `.model` file or a Hugging Face tokenizer folder (no download).

    Args:
        path: File or folder. A folder that holds `tokenizer.model` and nothing else that
            transformers could read is opened as SentencePiece.
        setting: Configuration key named in error messages.

    Raises:
        DataError: It is missing or unreadable.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(
            f"{setting}: '{path}' does not exist; give a SentencePiece .model file or a Hugging "
            "Face tokenizer folder"
        )
    if path.is_file():
        return SentencePieceTokenizer(path, setting)
    described = any((path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json"))
    if not described and (path / "tokenizer.model").exists():
        return SentencePieceTokenizer(path / "tokenizer.model", setting)
    return HuggingFaceTokenizer(path, setting)


class SentencePieceTokenizer:
    """A SentencePiece `.model` file."""

    def __init__(self, path: str | Path, setting: str = "data.tokenizer") -> None:
        """Opens the file.

        Raises:
            DataError: It is not a SentencePiece model, or has no beginning or end token.
        """
        self.path = Path(path)
        self._setting = setting
        unreadable = (
            f"{setting}: '{path}' is not a SentencePiece model; files of Tiktoken (tekken.json, or "
            "a .model of base64 lines) are not read: give a Hugging Face folder (tokenizer.json)"
        )
        raw = self.path.read_bytes()
        try:
            sentencepiece.SentencePieceProcessor(model_proto=raw)
        except (RuntimeError, ValueError):
            raise DataError(unreadable) from None
        protocol: Any = sentencepiece_model_pb2  # generated code, which type checkers cannot see
        spec = protocol.ModelProto()
        spec.ParseFromString(raw)
        if not spec.pieces:  # an empty file is a valid message
            raise DataError(unreadable)
        self.prefix_space = bool(spec.normalizer_spec.add_dummy_prefix)
        spec.normalizer_spec.add_dummy_prefix = False
        spec.normalizer_spec.remove_extra_whitespaces = False
        self._model = sentencepiece.SentencePieceProcessor(model_proto=spec.SerializeToString())
        self.vocab_size = self._model.vocab_size()
        self.bos_id, self.eos_id, self.has_bos = self._model.bos_id(), self._model.eos_id(), True
        if self.bos_id < 0 or self.eos_id < 0:
            raise DataError(
                f"{setting}: '{path}' has no beginning or end token; train it with both"
            )
        # User-defined symbols are matched inside text; those that templates place must not be.
        spelled = [name for name in CHAT_SYMBOLS if self._find(name) is not None]
        self._splitter = _special_splitter(spelled)
        self.fingerprint = hashlib.sha256(raw).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, literally."""
        ids: list[int] = []
        for piece in self._splitter(text):
            ids += self._model.encode(piece)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`; special tokens are left out."""
        special = {i for name in CHAT_SYMBOLS if (i := self._find(name)) is not None}
        kept = [int(i) for i in ids if int(i) not in special and int(i) < self.vocab_size]
        return self._model.decode(kept)

    def special_id(self, name: str) -> int:
        """Returns the id of a special token by its spelling, or raises DataError."""
        found = self._find(name)
        if found is None:
            raise DataError(
                f"{self._setting}: '{self.path}' has no token {name!r}, which data.template needs; "
                "choose the template that belongs to this tokenizer"
            )
        return found

    def _find(self, name: str) -> int | None:
        index = self._model.piece_to_id(name)
        return index if self._model.id_to_piece(index) == name else None


class HuggingFaceTokenizer:
    """A Hugging Face tokenizer folder, read with transformers, local files only."""

    def __init__(self, path: str | Path, setting: str = "data.tokenizer") -> None:
        """Opens the folder.

        Raises:
            DataError: transformers cannot read it without code that the folder brings, or it has
                no end token.
        """
        # Slow to import, and not every run needs it.
        from transformers import AutoTokenizer

        self.path = Path(path)
        self._setting = setting
        try:
            self._model: Any = AutoTokenizer.from_pretrained(str(path), **NO_FOREIGN_CODE)
        except Exception as error:
            if "trust_remote_code" in str(error):  # its advice is to let the code run
                raise DataError(
                    f"{setting}: '{path}' can only be read by Python code that it brings, and such "
                    "code is never run; give a fast tokenizer (tokenizer.json) or a .model file"
                ) from None
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"{setting}: '{path}' is not a Hugging Face tokenizer folder ({reason})"
            ) from error
        if self._model.eos_token_id is None:
            raise DataError(f"{setting}: '{path}' has no end token")
        self.eos_id, self.has_bos = self._model.eos_token_id, self._model.bos_token_id is not None
        self._first = self._model.bos_token if self.has_bos else self._model.eos_token
        self.bos_id = self._model.bos_token_id if self.has_bos else self.eos_id
        self.vocab_size = len(self._model)
        self._special = {
            str(token): index
            for index, token in self._model.added_tokens_decoder.items()
            if token.special or str(token) in CHAT_SYMBOLS
        }
        self._special.setdefault(self._first, self.bos_id)
        self._special.setdefault(self._model.eos_token, self.eos_id)
        self._splitter = _special_splitter(list(self._special))
        plain = self._model.encode("a", add_special_tokens=False)
        self.prefix_space = plain != self.encode("a") and plain == self.encode(" a")
        self.fingerprint = _folder_fingerprint(self.path)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, literally: encoded after a special token, which is dropped."""
        ids: list[int] = []
        for piece in self._splitter(text):
            found = self._model.encode(self._first + piece, add_special_tokens=False)
            ids += found[1:]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`; special tokens are left out."""
        dropped = set(self._special.values())
        kept = [int(i) for i in ids if int(i) not in dropped and int(i) < self.vocab_size]
        return str(self._model.decode(kept, skip_special_tokens=True))

    def special_id(self, name: str) -> int:
        """Returns the id of a special token by its spelling, or raises DataError."""
        if name in self._special:
            return self._special[name]
        raise DataError(
            f"{self._setting}: '{self.path}' has no token {name!r}, which data.template needs; "
            "choose the template that belongs to this tokenizer"
        )


def train_tokenizer(
    texts: Iterable[str],
    path: str | Path,
    vocab_size: int = 320,
    symbols: Sequence[str] = NEW_SYMBOLS,
) -> None:
    """Trains a tiny SentencePiece model that encodes any text, and writes it to `path`.

    Ids 0 to 3 are unk, bos, eos, pad; then the chat symbols, 256 byte pieces and what the texts
    yield. Digits are single pieces, a newline is a piece of its own (so that nothing merges
    across it), and no space is put in front of a text. The same texts give the same file.

    Args:
        texts: Training text; a text counts as often as it is given.
        path: Where the `.model` file goes.
        vocab_size: Most pieces; fewer if the texts do not yield as many.
        symbols: Special tokens of templates.
    """
    lines = sorted(line for text in texts for line in text.split("\n") if line.strip())
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),  # a file's path would end up in the model
        model_writer=written,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        control_symbols=list(symbols),
        user_defined_symbols=["\n"],
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        num_threads=1,
        minloglevel=2,
    )
    Path(path).write_bytes(written.getvalue())


def _special_splitter(names: Sequence[str]) -> Any:
    """Returns a function that cuts a text inside every spelled special token.

    The halves, encoded one by one, cannot be matched as that token.
    """
    if not names:
        return lambda text: [text] if text else []
    pattern = re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)))

    def split(text: str) -> list[str]:
        pieces, start = [], 0
        place = pattern.search(text)
        while place is not None:
            pieces.append(text[start : place.start() + 1])
            start = place.start() + 1
            place = pattern.search(text, start)
        pieces.append(text[start:])
        return [piece for piece in pieces if piece]

    return split


def _folder_fingerprint(folder: Path) -> str:
    """Hashes the tokenizer's files (not weights that may lie beside them)."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        known = "token" in file.name or file.name in ("vocab.json", "merges.txt", "spiece.model")
        if file.is_file() and known:
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
