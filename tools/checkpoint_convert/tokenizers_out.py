"""The tokenizer and processor of an export, checked against the trainer's own tokenizer."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dattn_mcore.config.schema import DataConfig, ModelConfig
from dattn_mcore.data.image_rules import rules_of
from dattn_mcore.data.templates import TextRun, encode_conversation, stop_id
from dattn_mcore.data.tiles import POLICIES
from dattn_mcore.data.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)
from dattn_mcore.errors import CheckpointError, DataError
from dattn_mcore.hf import (
    AUTO_MAP,
    IMAGE_PROCESSOR_AUTO_MAP,
    NO_FOREIGN_CODE,
    DattnImageProcessor,
    DattnProcessor,
)
from dattn_mcore.types import IMAGE_MARK
from tools.checkpoint_convert.chat_templates import chat_template
from tools.checkpoint_convert.configs import TokenIds

PROCESSOR = "processor_config.json"
_MODEL: Any = sentencepiece_model_pb2.ModelProto
_PIECE = _MODEL.SentencePiece
# Texts on which the exported tokenizer must give the ids of the trainer's, beside conversations.
PROBES = (
    "a",
    " a",
    "  two  spaces ",
    "Which digit is in the top-left cell?",
    "The digits are 4, 0, 9 and 27.\nRow two: 3-1.",
    "tab\tand\nnew\n\nlines",
    "ünïcödé 漢字 🙂 é",
    "[INST ] <s >",
    "\n",
)
TURNS = (
    (f"{IMAGE_MARK}\nWhich digit is in the top-left cell?",),
    (f"{IMAGE_MARK}\nWhat is here?", "A 7 and a 3."),
    (f"Compare {IMAGE_MARK} with {IMAGE_MARK}.", "They differ.", " How? ", "In colour.", "Why"),
    ("No image at all, only 12 words.", "Fine."),
)
SYSTEMS = ("", " Answer in\none word. ")


def export_processor(
    folder: Path, model: ModelConfig, data: DataConfig, ours: Tokenizer, template: str
) -> TokenIds:
    """Writes tokenizer, image processor and chat template into an export.

    Args:
        folder: the export.
        model: for the tower's image size.
        data: for the image policy, mean and standard deviation.
        ours: the tokenizer that the model was trained with.
        template: conversation template; becomes the chat template.

    Returns:
        Ids that the configurations name.

    Raises:
        CheckpointError: its export would not give the same ids, or the model has too few.
    """
    try:
        theirs = _convert(ours)
        stop = tuple(dict.fromkeys((ours.eos_id, stop_id(ours, template))))
    except DataError as error:
        raise CheckpointError(str(error)) from None
    if ours.vocab_size > model.llm.vocab_size:
        raise CheckpointError(
            f"{ours.path} has {ours.vocab_size} tokens, model.llm.vocab_size is "
            f"{model.llm.vocab_size}; give the tokenizer that the model was trained with"
        )
    theirs.padding_side = "left"
    theirs.chat_template = None
    processor = DattnProcessor(
        image_processor(model, data),
        theirs,
        chat_template=chat_template(template, ours.prefix_space),
        image_token=IMAGE_MARK,
    )
    try:
        check_tokenizer(ours, theirs, processor, template)
    except DataError as error:  # a token of the template that the tokenizer lacks
        raise CheckpointError(str(error)) from None
    save_processor(folder, processor)
    return TokenIds(
        bos=ours.bos_id if ours.has_bos else None,
        eos=ours.eos_id,
        pad=theirs.pad_token_id,
        image=theirs.convert_tokens_to_ids(IMAGE_MARK),
        stop=stop,
    )


def save_processor(folder: Path, processor: DattnProcessor) -> None:
    """Writes a processor into an export, with where its code lies."""
    processor.save_pretrained(folder)
    file = folder / PROCESSOR
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["auto_map"] = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
    settings["image_processor"]["auto_map"] = IMAGE_PROCESSOR_AUTO_MAP
    file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _convert(ours: Tokenizer) -> Any:
    """The trainer's tokenizer as one of transformers, with padding and the image token."""
    if isinstance(ours, SentencePieceTokenizer):
        theirs: Any = from_sentencepiece(ours.path)
    else:
        assert isinstance(ours, HuggingFaceTokenizer)
        theirs = AutoTokenizer.from_pretrained(str(ours.path), **NO_FOREIGN_CODE)
    if theirs.pad_token is None:
        theirs.pad_token = theirs.unk_token or theirs.eos_token
    theirs.add_special_tokens({"additional_special_tokens": [IMAGE_MARK]})
    return theirs


def from_sentencepiece(path: str | Path) -> PreTrainedTokenizerFast:
    """A SentencePiece model as a fast tokenizer that encodes literally (no space in front).

    Raises:
        CheckpointError: it has a feature that the `tokenizers` library cannot express.
    """
    spec = _MODEL()
    spec.ParseFromString(Path(path).read_bytes())
    pieces, trainer = list(spec.pieces), spec.trainer_spec
    if trainer.treat_whitespace_as_suffix:
        raise CheckpointError(f"{path}: white space as a suffix cannot be exported")
    if trainer.model_type == trainer.BPE:
        model: Any = _bpe(pieces, trainer)
    elif trainer.model_type == trainer.UNIGRAM:
        model = models.Unigram(
            [(p.piece, p.score) for p in pieces], trainer.unk_id, trainer.byte_fallback
        )
    else:
        raise CheckpointError(f"{path}: only bpe and unigram models can be exported")
    fast = FastTokenizer(model)
    steps: list[Any] = []
    if spec.normalizer_spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.normalizer_spec.precompiled_charsmap))
    fast.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    for piece in pieces:
        if piece.type in (_PIECE.CONTROL, _PIECE.USER_DEFINED, _PIECE.UNKNOWN):
            special = piece.type != _PIECE.USER_DEFINED
            text = piece.piece if special else piece.piece.replace("▁", " ")
            token = AddedToken(text, normalized=False, special=special)
            fast.add_special_tokens([token]) if special else fast.add_tokens([token])
    named = {
        "bos_token": trainer.bos_id,
        "eos_token": trainer.eos_id,
        "unk_token": trainer.unk_id,
        "pad_token": trainer.pad_id,
    }
    tokens = {name: pieces[index].piece for name, index in named.items() if index >= 0}
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, clean_up_tokenization_spaces=False, **tokens
    )


def _bpe(pieces: Sequence[Any], trainer: Any) -> Any:
    """A BPE model; merges are every split of a piece in two, best score first."""
    vocab = {piece.piece: index for index, piece in enumerate(pieces)}
    normal = {p.piece: i for i, p in enumerate(pieces) if p.type == _PIECE.NORMAL}
    merges: list[tuple[float, int, int, tuple[str, str]]] = []
    for piece in pieces:
        if piece.type != _PIECE.NORMAL:
            continue
        for cut in range(1, len(piece.piece)):
            left, right = piece.piece[:cut], piece.piece[cut:]
            if left in normal and right in normal:
                merges.append((-piece.score, normal[left], normal[right], (left, right)))
    return models.BPE(
        vocab,
        [pair for *_, pair in sorted(merges)],
        unk_token=pieces[trainer.unk_id].piece,
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
        ignore_merges=False,
    )


def image_processor(model: ModelConfig, data: DataConfig) -> DattnImageProcessor:
    """An image processor (Pillow) that does what training did.

    Raises:
        CheckpointError: the image policy is unknown.
    """
    side = model.vision.image_size
    if data.image_policy not in POLICIES:
        raise CheckpointError(
            f"data.image_policy is {data.image_policy!r}; it must be one of {', '.join(POLICIES)}"
        )
    return DattnImageProcessor(
        size={"height": side, "width": side},
        image_mean=list(data.image_mean),
        image_std=list(data.image_std),
        resample=3,  # bicubic
        image_policy=data.image_policy,
        anyres_grids=[list(grid) for grid in data.anyres_grids],
        **asdict(rules_of(data)),
    )


def messages(turns: Sequence[str], system: str = "") -> list[dict[str, str]]:
    """Turns (user, assistant, user, ...) in the form that chat templates read."""
    first = [{"role": "system", "content": system}] if system else []
    return first + [
        {"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)
    ]


def check_tokenizer(ours: Tokenizer, theirs: Any, processor: Any, template: str) -> None:
    """Checks that texts and conversations get the trainer's ids.

    Raises:
        CheckpointError: naming the first text that does not.
    """
    image, path = theirs.convert_tokens_to_ids(IMAGE_MARK), ours.path
    for text in PROBES:
        expected = ours.encode(text)
        first = theirs.bos_token or theirs.eos_token
        prefixed = theirs.encode(first + text, add_special_tokens=False)
        if prefixed != [ours.bos_id, *expected]:
            raise CheckpointError(
                f"{path}: the exported tokenizer encodes {text!r} as {prefixed[1:]} instead of "
                f"{expected}; this tokenizer cannot be exported exactly, export it by hand"
            )
    for turns, system in itertools.product(TURNS, SYSTEMS):
        if template == "plain" and len(turns) > 2:
            continue
        runs = encode_conversation(ours, template, turns, system)
        ids = [i for run in runs for i in (run.ids if isinstance(run, TextRun) else (image,))]
        text = processor.apply_chat_template(messages(turns, system))
        found = theirs.encode(text, add_special_tokens=False)
        if found != ids:
            raise CheckpointError(
                f"{path}: the chat template {template!r} gives {found} for {(system, *turns)!r} "
                f"instead of {ids}; this tokenizer does not suit the template, choose data.template"
            )
