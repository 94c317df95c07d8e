r"""Conversation templates: a sample becomes runs of ids and image places, segment by segment.

Ids are built from segments and never searched for in a tokenised whole. In what follows, `<x>`
is a special id and "..." is one call of `tokenizer.encode` (literal: as after a special token);
turns are stripped of outer white space first, and an image inside a user text `u` cuts the
segment in two, each half encoded alone. Loss is on what stands in braces.

    mistral   <bos> then, per pair of turns:  <[INST]> " u" <[/INST]> {" a" <eos>}
    gemma     <bos> then, per pair of turns:  <start_of_turn> "user\nu" <end_of_turn> "\n"
                  <start_of_turn> "model\n" {"a" <end_of_turn>} "\n"
    plain     images <bos> {"a" <eos>}        one pair of turns, user text dropped

None has a place of its own for a system turn `s`: the first user text is then "s\n\nu", as in
Mistral's own chat templates and Gemma 3's (Gemma 2's refuses one). Mistral's of v0.3 puts it into
the last turn if that is a user's, which no answer but the last could have seen.

This equals the ids of the Hugging Face chat templates `<s>[INST] u[/INST] a</s>` and
`<bos><start_of_turn>user\nu<end_of_turn>\n<start_of_turn>model\na<end_of_turn>\n` tokenised
as a whole, since those split at special tokens first; for gemma it needs a tokenizer that never
merges a newline with what follows (Gemma's does not, nor does the digits task's). A caption in
`plain` starts with a space where the tokenizer puts one in front of a text (Mistral).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from dattn_mcore.data.batch import Layout
from dattn_mcore.data.sources.record import IMAGE_MARK
from dattn_mcore.data.tokenizer import Tokenizer
from dattn_mcore.errors import ConfigError, DataError

TEMPLATES = ("plain", "mistral", "gemma")
NO_LOSS = -100


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
    """

    text_ids: tuple[int, ...]
    labels: tuple[int, ...]
    layout: Layout
    image_rows: tuple[int, ...]

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

    def special(self, index: int, supervised: bool = False) -> None:
        """Appends one special id."""
        self._ids.append(index)
        self._supervised.append(supervised)

    def text(self, text: str, supervised: bool = False) -> None:
        """Appends one segment of text, cut where images stand."""
        for number, piece in enumerate(text.split(IMAGE_MARK)):
            if number:
                self.image()
            if piece:
                ids = self._tokenizer.encode(piece)
                self._ids += ids
                self._supervised += [supervised] * len(ids)

    def image(self) -> None:
        """Appends the place of an image."""
        self._flush()
        self._runs.append(ImageRun())

    def runs(self) -> tuple[Run, ...]:
        """Returns everything written."""
        self._flush()
        return tuple(self._runs)

    def _flush(self) -> None:
        if self._ids:
            self._runs.append(TextRun(tuple(self._ids), tuple(self._supervised)))
            self._ids, self._supervised = [], []


def encode_conversation(
    tokenizer: Tokenizer, template: str, turns: Sequence[str], system: str = ""
) -> tuple[Run, ...]:
    """Builds the runs of a conversation.

    Args:
        tokenizer: Gives the ids.
        template: `plain`, `mistral` or `gemma`.
        turns: Human, gpt, human, ...; `<image>` marks stand in human turns. With an odd number
            of turns the runs end where the model has to answer (a prompt for generation).
        system: Text of a system turn; blank: there is none.

    Raises:
        ConfigError: The template is unknown.
        DataError: The template cannot hold these turns, or the tokenizer lacks a token of it.
    """
    check_template(template)
    if not turns:
        raise DataError("a conversation needs at least one turn")
    if template == "plain" and len(turns) > 2:
        raise DataError(f"template 'plain' holds one image caption pair, got {len(turns)} turns")
    if system.strip():
        turns = (f"{system.strip()}\n\n{turns[0].strip()}", *turns[1:])
    out = _Writer(tokenizer)
    if template == "plain":
        for _ in range(turns[0].count(IMAGE_MARK)):
            out.image()
    out.special(tokenizer.bos_id)
    for position in range(0, len(turns), 2):
        user = turns[position].strip()
        answer = turns[position + 1].strip() if position + 1 < len(turns) else None
        {"plain": _plain, "mistral": _mistral, "gemma": _gemma}[template](
            out, tokenizer, user, answer
        )
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
        after if counts else NO_LOSS for after, counts in zip(ids[1:], supervised[1:], strict=True)
    ]
    labels.append(NO_LOSS)
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
    return EncodedSample(
        sample.text_ids[:text_rows],
        sample.labels[: text_rows - 1] + (NO_LOSS,),
        tuple(layout),
        sample.image_rows[: sum(end <= visual for end in ends)],
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
    check_template(template)
    return tokenizer.special_id("<end_of_turn>") if template == "gemma" else tokenizer.eos_id


def check_template(template: str) -> None:
    """Raises ConfigError for an unknown template."""
    if template not in TEMPLATES:
        raise ConfigError(f"data.template: '{template}' is unknown; use {', '.join(TEMPLATES)}")


def _plain(out: _Writer, tokenizer: Tokenizer, user: str, answer: str | None) -> None:
    del user  # its images are placed already, its text is dropped
    if answer is not None:
        space = " " if tokenizer.prefix_space and answer else ""
        out.text(space + answer, supervised=True)
        out.special(tokenizer.eos_id, supervised=True)


def _mistral(out: _Writer, tokenizer: Tokenizer, user: str, answer: str | None) -> None:
    out.special(tokenizer.special_id("[INST]"))
    out.text(" " + user)
    out.special(tokenizer.special_id("[/INST]"))
    if answer is not None:
        out.text(" " + answer, supervised=True)
        out.special(tokenizer.eos_id, supervised=True)


def _gemma(out: _Writer, tokenizer: Tokenizer, user: str, answer: str | None) -> None:
    start, end = tokenizer.special_id("<start_of_turn>"), tokenizer.special_id("<end_of_turn>")
    out.special(start)
    out.text("user\n" + user)
    out.special(end)
    out.text("\n")
    out.special(start)
    out.text("model\n")
    if answer is not None:
        out.text(answer, supervised=True)
        out.special(end, supervised=True)
        out.text("\n")
