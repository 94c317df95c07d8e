"""Rows of a micro-batch, and the pairs of query and key that attention computes for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dattn_mcore.config.schema import Config
from dattn_mcore.types import Layout, visual_units


@dataclass(frozen=True)
class Rows:
    """What goes through the model.

    Attributes:
        text: text rows.
        visual: visual rows.
        tiles: images in the tower.
        labelled: text rows whose logits are computed.
        text_pairs: (query, key) pairs of text queries, in a layer without a sliding window.
        windowed_text_pairs: the same in a layer with one.
        visual_pairs: (query, key) pairs of visual queries: none with V2V diagonal.
        windowed_visual_pairs: the same in a layer with a sliding window.
        packs: micro-batches.
    """

    text: float
    visual: float
    tiles: float
    labelled: float
    text_pairs: float
    windowed_text_pairs: float
    visual_pairs: float = 0
    windowed_visual_pairs: float = 0
    packs: float = 1

    def __add__(self, other: Rows) -> Rows:
        """Rows of both."""
        return Rows(*(getattr(self, name) + getattr(other, name) for name in self.__annotations__))

    def __mul__(self, factor: float) -> Rows:
        """Rows of so many times this."""
        return Rows(*(getattr(self, name) * factor for name in self.__annotations__))


def causal_pairs(rows: int, window: int | None = None) -> int:
    """Pairs of a causal self-attention over a run of rows, each row itself included.

    Args:
        rows: queries, which are the keys as well.
        window: keys a query sees at most, itself included.
    """
    seen = min(rows, window or rows)
    return seen * (seen + 1) // 2 + (rows - seen) * seen


def rows_of(
    config: Config, layouts: Sequence[Layout], labelled: float, images_of: Sequence[int] = ()
) -> Rows:
    """Counts the rows and pairs of one pack, exactly.

    Args:
        config: model and attention mode.
        layouts: runs of each sample.
        labelled: text rows with a label.
        images_of: visual unit of each sample, whose rows are computed once (`types.visual_units`).
    """
    window = config.model.llm.sliding_window
    text, visual = 0, sum(visual_units(layouts, images_of))
    full, windowed = [0, 0], [0, 0]  # of text and of visual queries
    for layout in layouts:
        text += sum(rows for is_visual, rows in layout if not is_visual)
        for totals, pairs in (
            (full, _pairs(config, layout, None)),
            (windowed, _pairs(config, layout, window)),
        ):
            totals[0] += pairs[0]
            totals[1] += pairs[1]
    return Rows(
        text=text,
        visual=visual,
        tiles=visual / config.model.vision.rows_per_tile,
        labelled=labelled,
        text_pairs=full[0],
        windowed_text_pairs=windowed[0],
        visual_pairs=full[1],
        windowed_visual_pairs=windowed[1],
    )


def _pairs(config: Config, layout: Layout, window: int | None) -> tuple[int, int]:
    """Pairs of text and of visual queries of one sample.

    With `t2v_position: rope` all rows share one axis, and a window cuts text and visual keys
    alike; else each kind has its own, and pairs between the kinds know no window.
    """
    one_axis = config.attention.t2v_position == "rope"
    position = seen = 0  # rows, and visual rows, before this run
    pairs = {False: 0, True: 0}
    for is_visual, rows in layout:
        if one_axis:
            # Of the keys from the sample's first row on, without those of the rows before.
            end = causal_pairs(position + rows, window)
            pairs[is_visual] += end - causal_pairs(position, window)
        elif not is_visual:
            pairs[False] += rows * seen
        position += rows
        seen += rows if is_visual else 0
    if not one_axis:
        pairs[False] += causal_pairs(position - seen, window)
        pairs[True] = causal_pairs(seen, window)
    return pairs[False], pairs[True] if config.attention.v2v == "causal" else 0
