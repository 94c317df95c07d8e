"""A pack's rows over a context parallel group: what one of its ranks holds, and what it sees.

Visual rows never see each other, so they are dealt in consecutive shares and stay where they are.
Text rows are shared out so that causal work is even: each sample's rows are cut into twice as many
pieces as there are ranks, and a rank takes one from the front and its mirror image from the back,
as Megatron-Core deals sequences. A rank's hidden state is `[V_r; T_r]`, and all that lies between
two attentions sees no difference to a pack of these rows alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from dattn_mcore.layers.blocks import Block, CausalChunk, ContextRows
from dattn_mcore.layers.layout import DecomposedSeqParams

Span = tuple[int, int]  # rows [start, stop)


def text_spans(lengths: Sequence[int], ranks: int) -> list[list[Span]]:
    """Text rows of each rank, as spans of the pack's rows in their order, none across samples.

    No rank has more than one row more than another: of any number of rows from the first on a rank
    has as many as if they were dealt one by one.

    Args:
        lengths: text rows of each sample, one after the other.
        ranks: of the context parallel group.
    """
    spans: list[list[Span]] = [[] for _ in range(ranks)]
    first = 0
    for sample, length in enumerate(lengths):
        counts = [
            len(range(first + (r - first) % ranks, first + length, ranks)) for r in range(ranks)
        ]
        # An odd row is at the front in one sample, and at the back in the next.
        front = [(count + (sample + r) % 2) // 2 for r, count in enumerate(counts)]
        pieces = [*enumerate(front)]
        pieces += [(r, counts[r] - front[r]) for r in reversed(range(ranks))]
        stop = first
        own: list[list[Span]] = [[] for _ in range(ranks)]
        for rank, rows in pieces:
            start, stop = stop, stop + rows
            if own[rank] and own[rank][-1][1] == start:
                own[rank][-1] = own[rank][-1][0], stop
            elif rows:
                own[rank].append((start, stop))
        for found, new in zip(spans, own, strict=True):
            found += new
        first += length
    return spans


def share_of(params: DecomposedSeqParams, rank: int, ranks: int) -> DecomposedSeqParams:
    """A rank's rows of a pack.

    Args:
        params: of the whole pack; both its row counts are multiples of `ranks`.
        rank: of the context parallel group.
        ranks: of it.

    Returns:
        `num_visual`, `num_text` and positions are those of the rank; `context` says the rest.
        `blocks` and `reading_order` are empty: what a row sees goes beyond the rank.

    Raises:
        ValueError: the rows do not divide.
    """
    visual, text = params.num_visual // ranks, params.num_text // ranks
    spans = text_spans(params.text_lengths, ranks)
    if params.num_visual % ranks or params.num_text % ranks:
        raise ValueError(
            f"{params.num_visual} visual and {params.num_text} text rows do not divide by {ranks}"
        )
    order = _order(spans, text, params.num_text)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    device = params.text_positions.device
    own = torch.from_numpy(order[rank * text : (rank + 1) * text]).to(device)
    here = slice(rank * visual, (rank + 1) * visual)
    context = ContextRows(
        ranks=ranks,
        num_visual=params.num_visual,
        num_text=params.num_text,
        text_lengths=params.text_lengths,
        text_positions=params.text_positions,
        order=torch.from_numpy(order).to(device),
        place=torch.from_numpy(place).to(device),
        blocks=_clipped(params.blocks, here.start, here.stop),
        chunks=_chunks(spans[rank], params.text_lengths),
    )
    return replace(
        params,
        num_visual=visual,
        num_text=text,
        blocks=(),
        reading_order=params.reading_order[:0],
        text_positions=params.text_positions[own],
        visual_positions=params.visual_positions[here],
        cache={},
        context=context,
    )


def own_text_rows(context: ContextRows, rank: int) -> torch.Tensor:
    """int64 [T_r], the pack's row in the place of each text row of a rank."""
    rows = context.num_text // context.ranks
    return context.order[rank * rows : (rank + 1) * rows]


def _order(spans: Sequence[Sequence[Span]], rows: int, padded: int) -> np.ndarray:
    """See `ContextRows.order`; the pack's padding rows fill up the ranks."""
    order = np.full((len(spans), rows), -1, dtype=np.int64)
    for rank, own in enumerate(spans):
        found = np.concatenate([np.arange(0), *(np.arange(a, b) for a, b in own)])
        order[rank, : len(found)] = found
    real = sum(stop - start for own in spans for start, stop in own)
    order[order < 0] = np.arange(real, padded)
    return order.reshape(-1)


def _clipped(blocks: Sequence[Block], start: int, stop: int) -> tuple[Block, ...]:
    """Blocks over visual rows [start, stop) alone, counted from there."""
    found = (
        replace(
            block,
            visual_start=max(block.visual_start, start) - start,
            visual_stop=min(block.visual_stop, stop) - start,
        )
        for block in blocks
    )
    return tuple(block for block in found if block.visual_start < block.visual_stop)


def _chunks(spans: Sequence[Span], lengths: Sequence[int]) -> tuple[CausalChunk, ...]:
    """What each span of a rank's rows sees: its sample up to its own end."""
    ends = np.cumsum(np.array(lengths, dtype=np.int64))
    chunks, first = [], 0
    for start, stop in spans:
        sample = int(np.searchsorted(ends, start, "right"))
        begin = int(ends[sample]) - lengths[sample]
        chunks.append(CausalChunk(first, first + stop - start, begin, stop))
        first += stop - start
    return tuple(chunks)
