"""Conversations to ids: a sample becomes runs of ids and image places, segment by segment.

What a template is stands in `architectures.chat` and in the families' records. Ids are built from
its segments and never searched for in a tokenised whole; turns are stripped of outer white space
first, and an image inside a user's text cuts the segment in two, each half encoded alone.

This equals the ids of the Hugging Face chat template tokenised as a whole, since tokenizers split
at special tokens first. It needs a tokenizer that never merges fixed text between special tokens
(such as a newline) with what follows.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dattn_mcore.architectures import chat_templates
from dattn_mcore.architectures.chat import BOS, EOS, ChatTemplate, Images, Segment, Text, Token
from dattn_mcore.data.tokenizer import Tokenizer
from dattn_mcore.errors import ConfigError, DataError
from dattn_mcore.types import IGNORED_LABEL, IMAGE_MARK, Layout


@dataclass(frozen=True)
class TextRun:
    """Ids in reading order, and for each whether it is to be predicted."""

    ids: tuple[int, ...]
    supervised: tuple[bool, ...]


@dataclass(frozen=True)
class ImageRun:
    """The place of the next image of the sample."""


Run = TextRun | ImageRun


@dataclass(frozen=True)
class EncodedSample:
    """A sample as the model reads it.

    Attributes:
        text_ids: Ids of its text rows; images take no part.
        labels: For each text row the id it must predict (the next text row's), or -100.
        layout: Its runs in reading order.
        image_rows: Visual rows of each image that stands in the layout.
        weight: What the loss of its tokens counts.
    """

    text_ids: tuple[int, ...]
    labels: tuple[int, ...]
    layout: Layout
    image_rows: tuple[int, ...]
    weight: float = 1.0

    @property
    def num_images(self) -> int:
        """Images that stand in the layout."""
        return len(self.image_rows)

    @property
    def visual_rows(self) -> int:
        """Number of visual rows."""
        return sum(self.image_rows)


class _Writer:
    """Collects segments; neighbouring text becomes one run."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._runs: list[Run] = []
        self._ids: list[int] = []
        self._supervised: list[bool] = []

    def write(self, segments: Sequence[Segment], said: str = "", learned: bool = True) -> None:
        """Appends the segments of a turn in which `said` is said; not `learned`: without loss."""
        for segment in segments:
            if isinstance(segment, Token):
                self._ids.append(token_id(self._tokenizer, segment))
                self._supervised.append(segment.supervised and learned)
            elif isinstance(segment, Images):
                for _ in range(said.count(IMAGE_MARK)):
                    self._image()
            else:
                space = " " if segment.opens and said and self._tokenizer.prefix_space else ""
                middle = said if segment.holds == "said" else ""
                text = f"{space}{segment.before}{middle}{segment.after}"
                self._text(text, segment.supervised and learned)

    def runs(self) -> tuple[Run, ...]:
        """Returns everything written."""
        self._flush()
        return tuple(self._runs)

    def _text(self, text: str, supervised: bool) -> None:
        """Appends one segment of text, cut where images stand."""
        for number, piece in enumerate(text.split(IMAGE_MARK)):
            if number:
                self._image()
            if piece:
                ids = self._tokenizer.encode(piece)
                self._ids += ids
                self._supervised += [supervised] * len(ids)

    def _image(self) -> None:
        self._flush()
        self._runs.append(ImageRun())

    def _flush(self) -> None:
        if self._ids:
            self._runs.append(TextRun(tuple(self._ids), tuple(self._supervised)))
            self._ids, self._supervised = [], []


def encode_conversation(
    tokenizer: Tokenizer,
    template: str,
    turns: Sequence[str],
    system: str = "",
    learned: Sequence[bool] = (),
) -> tuple[Run, ...]:
    """Builds the runs of a conversation.

    Args:
        tokenizer: Gives the ids.
        template: Name of a conversation template.
        turns: Human, gpt, human, ...; `<image>` marks stand in human turns. With an odd number
            of turns the runs end where the model has to answer (a prompt for generation).
        system: Text of a system turn; blank: there is none.
        learned: Whether each answer has loss; empty: all have.

    Raises:
        ConfigError: The template is unknown.
        DataError: The template cannot hold these turns, or the tokenizer lacks a token of it.
    """
    chat = find_template(template)
    if not turns:
        raise DataError("a conversation needs at least one turn")
    if chat.one_pair and len(turns) > 2:
        raise DataError(
            f"template {template!r} holds one image caption pair, got {len(turns)} turns"
        )
    system = system.strip() or chat.default_system or ""
    out = _Writer(tokenizer)
    out.write(chat.begin)
    if system and chat.system is None:
        turns = (f"{system}\n\n{turns[0].strip()}", *turns[1:])
    elif system and chat.system is not None:
        out.write(chat.system, system)
    last_user = (len(turns) - 1) // 2 * 2
    for position, said in enumerate(turns):
        if position % 2:
            out.write(chat.answer, said.strip(), not learned or learned[position // 2])
        else:
            out.write(chat.user, said.strip())
        if position == last_user:
            out.write(chat.before_last_answer)
    return out.runs()


def encode_document(tokenizer: Tokenizer, text: str) -> tuple[Run, ...]:
    """Builds the runs of a text that is learned as a whole, whatever the template.

    Args:
        tokenizer: Gives the ids.
        text: An `<image>` mark for each image; images that begin it stand before its first token.
    """
    out = _Writer(tokenizer)
    text = text.strip()
    while text.startswith(IMAGE_MARK):
        out.write((Images(),), IMAGE_MARK)
        text = text.removeprefix(IMAGE_MARK).lstrip()
    out.write((Token(BOS),))
    out.write((Text(holds="said", supervised=True, opens=True), Token(EOS, supervised=True)), text)
    return out.runs()


def encode_sample(runs: Sequence[Run], image_rows: int | Sequence[int]) -> EncodedSample:
    """Turns runs into ids, shifted labels and a layout.

    Args:
        runs: From `encode_conversation`.
        image_rows: Visual rows of each image, in order; one number where all have as many.
    """
    num_images = sum(isinstance(run, ImageRun) for run in runs)
    rows_of = (image_rows,) * num_images if isinstance(image_rows, int) else tuple(image_rows)
    assert len(rows_of) == num_images, (len(rows_of), num_images)
    left = iter(rows_of)
    ids: list[int] = []
    supervised: list[bool] = []
    layout: list[tuple[bool, int]] = []
    for run in runs:
        if isinstance(run, TextRun):
            ids += run.ids
            supervised += run.supervised
            layout.append((False, len(run.ids)))
        else:
            layout.append((True, next(left)))
    labels = [
        after if counts else IGNORED_LABEL
        for after, counts in zip(ids[1:], supervised[1:], strict=True)
    ]
    labels.append(IGNORED_LABEL)
    return EncodedSample(tuple(ids), tuple(labels), merge_runs(layout), rows_of)


def merge_runs(layout: Sequence[tuple[bool, int]]) -> Layout:
    """Joins neighbouring runs of one kind, so that a layout has one spelling."""
    merged: list[tuple[bool, int]] = []
    for is_visual, rows in layout:
        if merged and merged[-1][0] == is_visual:
            merged[-1] = (is_visual, merged[-1][1] + rows)
        else:
            merged.append((is_visual, rows))
    return tuple(merged)


def truncate(sample: EncodedSample, text_rows: int) -> EncodedSample:
    """Cuts a sample after its first `text_rows` text rows, in reading order.

    Images that stand behind the cut go as well: no row that is left can see them. The last row
    left predicts nothing.
    """
    if len(sample.text_ids) <= text_rows:
        return sample
    layout: list[tuple[bool, int]] = []
    left = text_rows
    for is_visual, rows in sample.layout:
        if left == 0:
            break
        layout.append((is_visual, rows if is_visual else min(rows, left)))
        left -= 0 if is_visual else min(rows, left)
    visual = sum(rows for is_visual, rows in layout if is_visual)
    ends = itertools.accumulate(sample.image_rows)
    return replace(
        sample,
        text_ids=sample.text_ids[:text_rows],
        labels=sample.labels[: text_rows - 1] + (IGNORED_LABEL,),
        layout=tuple(layout),
        image_rows=sample.image_rows[: sum(end <= visual for end in ends)],
    )


def check_symbols(tokenizer: Tokenizer, template: str) -> None:
    """Checks that a tokenizer has the special tokens of a template.

    Raises:
        ConfigError: The template is unknown.
        DataError: Names the token that it lacks.
    """
    encode_conversation(tokenizer, template, ("", ""))


def stop_id(tokenizer: Tokenizer, template: str) -> int:
    """Returns the id that ends an answer in `template`."""
    return token_id(tokenizer, find_template(template).stop)


def token_id(tokenizer: Tokenizer, token: Token) -> int:
    """Returns the id of a special token of a template, or raises DataError."""
    if token.name == BOS:
        return tokenizer.bos_id
    return tokenizer.eos_id if token.name == EOS else tokenizer.special_id(token.name)


def find_template(template: str) -> ChatTemplate:
    """Returns a conversation template by its name.

    Raises:
        ConfigError: There is none of this name.
    """
    known = chat_templates()
    if template not in known:
        raise ConfigError(f"data.template: '{template}' is unknown; use {', '.join(known)}")
    return known[template]
