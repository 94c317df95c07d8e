"""Rows of a pack: which of them a kernel call takes, and how its results come back.

What text rows see of the visual rows of a sample is a staircase: later text sees the images of
earlier text and more. `passes_over_images` cuts it into rectangles, arranged so that one kernel
call after the other reads no row twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from dattn_mcore.layers.layout import Block

Rows = slice | torch.Tensor  # consecutive rows, or int64 indices, none twice


def passes_over_images(blocks: Sequence[Block]) -> list[list[Block]]:
    """Rectangles of text by visual rows that together are what the blocks see.

    A sample's runs of text are halved again and again. The later half sees all images of the
    earlier half: one rectangle. At the end each run has its own newest images left. The rectangles
    of one depth have no text row and no visual row in common, so a pass over all of them copies
    each row at most once, and n runs take 1 + ceil(log2(n)) passes. Taking the runs as they are
    would copy an image's keys for every run after it; taking the images, each text row for every
    image it sees.

    Args:
        blocks: `DecomposedSeqParams.blocks`.

    Returns:
        Passes of rectangles, each in the order of the rows: first every run with its newest images,
        which are mostly consecutive rows, then the halves, each at most half of all rows.
    """
    newest: list[Block] = []
    halves: list[list[Block]] = []
    for first, group in itertools.groupby(blocks, key=lambda block: block.visual_start):
        runs = [block for block in group if block.text_start < block.text_stop]
        if runs:
            _halve(_without_repeats(runs), first, halves, 0, newest)
    return [newest, *halves] if newest else []


def _without_repeats(runs: Sequence[Block]) -> list[Block]:
    """Joins neighbouring runs of a sample that see the same rows."""
    joined: list[Block] = []
    for _, group in itertools.groupby(runs, key=lambda block: block.visual_stop):
        same = list(group)
        first, last = same[0], same[-1]
        joined.append(
            Block(first.text_start, last.text_stop, first.visual_start, first.visual_stop)
        )
    return joined


def _halve(
    runs: list[Block], start: int, halves: list[list[Block]], depth: int, newest: list[Block]
) -> None:
    """Adds what a sample's runs see from visual row `start` on."""
    if len(runs) == 1:
        (run,) = runs
        newest.append(Block(run.text_start, run.text_stop, start, run.visual_stop))
        return
    if depth == len(halves):
        halves.append([])
    half = len(runs) // 2
    early, late = runs[:half], runs[half:]
    middle = early[-1].visual_stop
    halves[depth].append(Block(late[0].text_start, late[-1].text_stop, start, middle))
    _halve(early, start, halves, depth + 1, newest)
    _halve(late, middle, halves, depth + 1, newest)


def rows_of(spans: Sequence[tuple[int, int]], device: torch.device) -> Rows:
    """Rows of (start, stop) spans, one after the other: a slice where they are consecutive."""
    if all(before[1] == after[0] for before, after in itertools.pairwise(spans)):
        return slice(spans[0][0], spans[-1][1]) if spans else slice(0, 0)
    start, stop = np.array(spans, dtype=np.int64).T
    lengths = stop - start
    # Within a span rows count on from its start; before it stand the rows of the spans before.
    first = np.repeat(start - (np.cumsum(lengths) - lengths), lengths)
    return torch.from_numpy(first + np.arange(len(first))).to(device)


def put_rows(whole: torch.Tensor, rows: Rows, values: torch.Tensor) -> None:
    """Writes values into rows, in the dtype of the whole."""
    if isinstance(rows, slice):
        whole[rows].copy_(values)
    else:
        whole.index_copy_(0, rows, values.to(whole.dtype))


def add_rows(whole: torch.Tensor, rows: Rows, values: torch.Tensor) -> None:
    """Adds values to rows. No atomics: rows has none twice, so the sum has one order."""
    if isinstance(rows, slice):
        whole[rows].add_(values)
    else:
        whole.index_copy_(0, rows, whole[rows].add_(values))
