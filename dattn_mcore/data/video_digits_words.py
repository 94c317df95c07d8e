"""The tokenizer of the digits videos: that of the images, and whole words for time.

Its ids mean what they mean in the images' tokenizer, so that a model of the images can go on with
videos. The words take the place of pieces that no text of the images uses: a tokenizer of so few
texts has spare ones, pairs of letters which always become part of a longer piece.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from dattn_mcore.errors import DataError

_SPACE = "\u2581"  # how SentencePiece writes a space
# Every word of `video_digits_questions` that the images' texts do not have.
WORDS = tuple(
    f"{_SPACE}{word}"
    for word in ("came", "first", "second", "third", "fourth", "there", "at", "did", "appear")
) + tuple(f"{_SPACE}{word}" for word in ("order", "places"))
WORDS += ("When", "Where", "Read", ",", ".", "0s", "1s", "2s", "3s")


def write_tokenizer(source: Path, target: Path, kept: Sequence[str]) -> None:
    """Writes a tokenizer with `WORDS` in place of spare pieces.

    Args:
        source: SentencePiece file of the images.
        target: file to write.
        kept: texts whose ids must be the same in both.

    Raises:
        DataError: the source has too few spare pieces.
    """
    protocol: Any = sentencepiece_model_pb2  # generated code, which type checkers cannot see
    spec = protocol.ModelProto()
    spec.ParseFromString(source.read_bytes())
    before = _ids(spec, kept)
    used = {number for ids in before for number in ids}
    normal = protocol.ModelProto.SentencePiece.NORMAL
    spare = [
        number
        for number, piece in enumerate(spec.pieces)
        if piece.type == normal and number not in used and len(piece.piece) > 1
    ]
    words = iter(WORDS)
    word = next(words, None)
    for number in reversed(spare):  # the rarest first
        if word is None:
            break
        piece = spec.pieces[number]
        old = (piece.piece, piece.type)
        piece.piece, piece.type = word, protocol.ModelProto.SentencePiece.USER_DEFINED
        if _ids(spec, kept) == before:
            word = next(words, None)
        else:  # a longer piece is made of it
            piece.piece, piece.type = old
    if word is not None:
        raise DataError(f"{source} has no spare piece for {word!r}; prepare the images' data again")
    target.write_bytes(spec.SerializeToString())


def _ids(spec: Any, texts: Iterable[str]) -> list[list[int]]:
    processor = sentencepiece.SentencePieceProcessor(model_proto=spec.SerializeToString())
    return [processor.encode(text) for text in texts]
