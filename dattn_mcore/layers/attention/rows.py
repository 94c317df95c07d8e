"""Rows of a pack: which of them a kernel call takes, and how its results come back.

What text rows see of the visual rows of a sample is a staircase: later text sees the images of
earlier text and more. `passes_over_images` cuts it into rectangles, arranged so that one kernel
call after the other reads no row twice.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from dattn_mcore.layers.blocks import Block

Rows = slice | torch.Tensor  # consecutive rows, or int64 indices, none twice
Span = tuple[int, int]  # rows [start, stop)


@dataclass(frozen=True)
class Rectangle:
    """Query rows that all see the same key rows.

    Attributes:
        q_spans: spans of query rows, in their order, none adjacent to another.
        k_span: consecutive key rows.
    """

    q_spans: tuple[Span, ...]
    k_span: Span

    @property
    def queries(self) -> int:
        """Number of query rows."""
        return sum(stop - start for start, stop in self.q_spans)

    @property
    def keys(self) -> int:
        """Number of key rows."""
        return self.k_span[1] - self.k_span[0]


@dataclass
class _Step:
    """Text rows that see visual rows up to the same one."""

    q_spans: list[Span]
    stop: int


@dataclass
class _Layer:
    """Staircases that have no text row and no visual row in common.

    Attributes:
        taken: bool [text rows], those of its staircases.
        visual_stop: end of its staircases' visual rows.
        passes: newest visual rows first, then the halves.
    """

    taken: np.ndarray
    visual_stop: int = 0
    newest: list[Rectangle] = field(default_factory=list)
    halves: list[list[Rectangle]] = field(default_factory=list)


def passes_over_images(blocks: Sequence[Block]) -> list[list[Rectangle]]:
    """Rectangles of text by visual rows that together are what the blocks see.

    Blocks that begin at the same visual row are a staircase, whichever samples they belong to: a
    text row that sees up to one of its steps sees all steps before. Text rows that see the same
    visual rows are one step. The steps are halved again and again. The later half sees all images
    of the earlier half: one rectangle. At the end each step has its own newest images left. The
    rectangles of one depth have no text row and no visual row in common, so a pass over all of them
    copies each row at most once, and n steps take 1 + ceil(log2(n)) passes. Taking the steps as
    they are would copy an image's keys for every step after it; taking the images, each text row
    for every image it sees.

    Staircases of different samples are usually apart and share their passes. One that has a row in
    common with another (images that several samples see, text in several blocks) goes into passes
    of its own: there are as many such layers at most as staircases that meet.

    Args:
        blocks: `DecomposedSeqParams.blocks`.

    Returns:
        Passes of rectangles, each in the order of the rows: first every step with its newest
        images, which are mostly consecutive rows, then the halves, each at most half of all rows.
    """
    staircases: dict[int, dict[int, list[Span]]] = defaultdict(lambda: defaultdict(list))
    for block in blocks:
        if block.text_start < block.text_stop and block.visual_start < block.visual_stop:
            same_rows = staircases[block.visual_start][block.visual_stop]
            same_rows.append((block.text_start, block.text_stop))
    text_rows = max((block.text_stop for block in blocks), default=0)
    layers: list[_Layer] = []
    for start, by_stop in sorted(staircases.items()):
        steps = [_Step(spans, stop) for stop, spans in sorted(by_stop.items())]
        layer = _layer_for(start, steps, layers, text_rows)
        _halve(steps, start, layer, 0)
    return [rectangles for layer in layers for rectangles in (layer.newest, *layer.halves)]


def _layer_for(start: int, steps: list[_Step], layers: list[_Layer], text_rows: int) -> _Layer:
    """The first layer that has no row of a staircase, which is now in it."""
    spans = [span for step in steps for span in step.q_spans]

    def is_free(layer: _Layer) -> bool:
        return layer.visual_stop <= start and not any(layer.taken[a:b].any() for a, b in spans)

    found = next(filter(is_free, layers), None)
    if found is None:
        found = _Layer(np.zeros(text_rows, dtype=bool))
        layers.append(found)
    for a, b in spans:
        found.taken[a:b] = True
    found.visual_stop = steps[-1].stop
    return found


def _halve(steps: list[_Step], start: int, layer: _Layer, depth: int) -> None:
    """Adds what the steps see from visual row `start` on."""
    if len(steps) == 1:
        layer.newest.append(_rectangle(steps, start, steps[0].stop))
        return
    if depth == len(layer.halves):
        layer.halves.append([])
    half = len(steps) // 2
    early, late = steps[:half], steps[half:]
    middle = early[-1].stop
    layer.halves[depth].append(_rectangle(late, start, middle))
    _halve(early, start, layer, depth + 1)
    _halve(late, middle, layer, depth + 1)


def _rectangle(steps: list[_Step], start: int, stop: int) -> Rectangle:
    spans = sorted(span for step in steps for span in step.q_spans)
    joined = spans[:1]
    for a, b in spans[1:]:
        if joined[-1][1] == a:
            joined[-1] = joined[-1][0], b
        else:
            joined.append((a, b))
    return Rectangle(tuple(joined), (start, stop))


def q_rows_of(rectangles: Iterable[Rectangle], device: torch.device) -> Rows:
    """Query rows of rectangles, one after the other."""
    return rows_of([span for one in rectangles for span in one.q_spans], device)


def k_rows_of(rectangles: Iterable[Rectangle], device: torch.device) -> Rows:
    """Key rows of rectangles, one after the other."""
    return rows_of([one.k_span for one in rectangles], device)


def sample_rectangles(lengths: Sequence[int]) -> list[Rectangle]:
    """Each sample's rows by themselves; samples without rows are absent."""
    ends = list(itertools.accumulate(lengths))
    spans = [(end - length, end) for end, length in zip(ends, lengths, strict=True) if length]
    return [Rectangle((span,), span) for span in spans]


def rows_of(spans: Sequence[Span], device: torch.device) -> Rows:
    """Rows of (start, stop) spans, one after the other: a slice where they are consecutive."""
    if all(before[1] == after[0] for before, after in itertools.pairwise(spans)):
        return slice(spans[0][0], spans[-1][1]) if spans else slice(0, 0)
    start, stop = np.array(spans, dtype=np.int64).T
    lengths = stop - start
    # Within a span rows count on from its start; before it stand the rows of the spans before.
    first = np.repeat(start - (np.cumsum(lengths) - lengths), lengths)
    return torch.from_numpy(first + np.arange(len(first))).to(device)


def covers(rows: Rows, whole: torch.Tensor) -> bool:
    """Whether these are all rows, in their order."""
    return isinstance(rows, slice) and rows.start == 0 and rows.stop == len(whole)


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
