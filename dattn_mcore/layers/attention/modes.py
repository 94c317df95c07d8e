"""What the rows of a pack ask in each mode: softmaxes over sets of keys.

This is the only place that knows the modes. A backend computes a `Softmax` in its own way, and
`attend` puts the rows together.

| mode | text rows | visual rows |
|---|---|---|
| `t2v_position=none` | visual keys, nothing rotated; text keys, rotated | themselves, causally |
| `t2v_position=rope` | visual keys, rotated; text keys, rotated | all rows, in reading order |
| baseline | all rows, in reading order | all rows, in reading order |

Both sets of a text row's keys share one softmax (`merge=alpha`) or have one each (`sum`). Visual
rows ask with `v2v=causal` only. The baseline is `causal`, `rope` and `alpha` together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dattn_mcore.layers.attention.inputs import AttentionInputs, RowKind
from dattn_mcore.layers.attention.options import AttentionOptions
from dattn_mcore.layers.blocks import Block, CausalChunk, ContextRows
from dattn_mcore.layers.layout import DecomposedSeqParams


@dataclass(frozen=True)
class Causal:
    """Queries are the keys' own rows; each sees the rows of its sample up to itself.

    Attributes:
        lengths: rows per sample.
        window: keys that are this many positions or more before the query are not seen; None: all
            are.
    """

    lengths: tuple[int, ...]
    window: int | None


@dataclass(frozen=True)
class InBlocks:
    """A text row sees the visual rows of all blocks that hold it.

    Attributes:
        blocks: see `DecomposedSeqParams.blocks`. Any of them may hold any visual rows.
        window: as in `Causal`.
    """

    blocks: tuple[Block, ...]
    window: int | None


@dataclass(frozen=True)
class InChunks:
    """Text rows of one context parallel rank, which see text rows of the whole pack causally.

    Attributes:
        chunks: see `CausalChunk`.
        window: as in `Causal`.
    """

    chunks: tuple[CausalChunk, ...]
    window: int | None

    def blocks(self) -> tuple[Block, ...]:
        """The same, as what each row sees; a block's "visual" rows are the keys.

        Rows of a sample are taken to be a position apart (see `window_skips_positions`).
        """
        rows = [
            (chunk.q_start + row, chunk.k_start, chunk.k_stop - chunk.rows + row + 1)
            for chunk in self.chunks
            for row in range(chunk.rows)
        ]
        reach = self.window
        return tuple(
            Block(row, row + 1, start if reach is None else max(start, stop - reach), stop)
            for row, start, stop in rows
        )


@dataclass(frozen=True)
class KeySet:
    """Keys and values of a softmax, and what is seen of them.

    Attributes:
        rows: which rows they are.
        rotated: queries and keys meet at their positions, else as they are.
        sees: what each query sees.
    """

    rows: RowKind
    rotated: bool
    sees: Causal | InBlocks | InChunks

    @property
    def key(self) -> tuple[str, ...]:
        """Names the set in a pack's cache, its window apart."""
        kinds = {Causal: "causal", InBlocks: "blocks", InChunks: "chunks"}
        return self.rows, kinds[type(self.sees)]


@dataclass(frozen=True)
class Softmax:
    """Queries over the union of some sets of keys.

    Attributes:
        queries: which rows ask.
        lengths: query rows per sample.
        key_sets: the sets; none of them has a key of another one.
        answers: of which rows the output is wanted; several softmaxes for one kind are added.
    """

    queries: RowKind
    lengths: tuple[int, ...]
    key_sets: tuple[KeySet, ...]
    answers: tuple[RowKind, ...]


def softmaxes(params: DecomposedSeqParams, options: AttentionOptions) -> tuple[Softmax, ...]:
    """What a pack's rows ask in the mode of `options`; worked out once per pack."""
    key = ("softmaxes", options)
    if key not in params.cache:
        params.cache[key] = tuple(_softmaxes(params, options))
    return params.cache[key]


def _softmaxes(params: DecomposedSeqParams, options: AttentionOptions) -> list[Softmax]:
    found: list[Softmax] = []
    if options.is_baseline:
        return [_in_reading_order(params, options, ("visual", "text"))]
    if options.v2v == "causal":
        if options.debiased:
            own = Causal(params.visual_lengths, options.window)
            rotated = KeySet("visual", True, own)
            found.append(Softmax("visual", own.lengths, (rotated,), ("visual",)))
        else:
            found.append(_in_reading_order(params, options, ("visual",)))
    # Without positions there is no distance that a window could bound.
    seen = InBlocks(params.blocks, None if options.debiased else options.window)
    over_visual = KeySet("visual", not options.debiased, seen)
    over_text = KeySet("text", True, Causal(params.text_lengths, options.window))
    together = ((over_visual, over_text),)
    apart = ((over_visual,), (over_text,))
    for key_sets in together if options.merge == "alpha" else apart:
        found.append(Softmax("text", params.text_lengths, key_sets, ("text",)))
    return found


def divided_key_sets(context: ContextRows, options: AttentionOptions) -> tuple[KeySet, KeySet]:
    """What text rows ask where a pack's rows are divided: visual keys, then text keys.

    The whole pack's text rows ask a rank's visual keys; the rank's text rows ask the whole pack's
    text keys.

    Raises:
        ValueError: the mode lets visual rows see each other.
    """
    if options.v2v != "diagonal":
        raise ValueError(f"with v2v={options.v2v} visual rows cannot be divided: they see others")
    seen = InBlocks(context.blocks, None if options.debiased else options.window)
    over_visual = KeySet("visual", not options.debiased, seen)
    return over_visual, KeySet("text", True, InChunks(context.chunks, options.window))


def _in_reading_order(
    params: DecomposedSeqParams, options: AttentionOptions, answers: tuple[RowKind, ...]
) -> Softmax:
    """Stock causal attention over `[visual; text]`."""
    lengths = tuple(v + t for v, t in zip(params.visual_lengths, params.text_lengths, strict=True))
    own = KeySet("reading", True, Causal(lengths, options.window))
    return Softmax("reading", lengths, (own,), answers)


def attend(
    inputs: AttentionInputs,
    options: AttentionOptions,
    compute: Callable[[Softmax], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A whole backend, from how it computes one softmax.

    Args:
        inputs: the pack.
        options: what the layer computes.
        compute: output [query rows, heads, head_dim] of a softmax; zero on padding rows.

    Returns:
        As `Backend.attend`.
    """
    params = inputs.params
    outputs: dict[str, list[torch.Tensor]] = {"text": [], "visual": []}
    for softmax in softmaxes(params, options):
        out = compute(softmax)
        if softmax.queries != "reading":
            outputs[softmax.queries].append(out)
            continue
        rows = out.new_zeros((params.num_visual + params.num_text, *out.shape[1:]))
        rows = rows.index_copy(0, params.reading_order, out)
        split = rows.split([params.num_visual, params.num_text])
        for name, part in zip(("visual", "text"), split, strict=True):
            if name in softmax.answers:
                outputs[name].append(part)
    text, visual = (sum(found[1:], found[0]) if found else None for found in outputs.values())
    assert text is not None
    return text, visual
