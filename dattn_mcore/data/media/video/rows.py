"""How many frames a video keeps, and how fine their grids are, within a budget of visual rows."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dattn_mcore.data.media.video.settings import Reduce

_LEAST_SIDE = 3  # a grid is not shrunk below a third of its side


def rows_of_frame(side: int, block: int) -> int:
    """Visual rows of a frame.

    Args:
        side: cells along a side of its grid.
        block: cells along a side of a block that becomes one row.
    """
    return math.ceil(side / block) ** 2


def plan_rows(
    times: Sequence[float], *, side: int, block: int, max_rows: int, reduce: Reduce
) -> tuple[tuple[float, ...], int]:
    """Fits a video into a budget, by its own numbers alone: never by its neighbours' in a pack.

    With `resolution` grids shrink first, by the square root of what is too much, as far as a third
    of their side; then frames are left out. With `frames` frames are left out, and grids shrink
    only where one frame alone is too much. Frames that are left out are spread evenly.

    Args:
        times: of the frames.
        side: cells along a side of a frame's whole grid.
        block: cells along a side of a block that becomes one row; a shrunk side is a multiple.
        max_rows: the budget.
        reduce: what is reduced first.

    Returns:
        Times of the frames that are kept, and the side of their grids.

    Raises:
        ValueError: not even one frame of the smallest grid fits.
    """
    if len(times) * rows_of_frame(side, block) <= max_rows:
        return tuple(times), side
    least = max(block, -(-side // (_LEAST_SIDE * block)) * block)
    if reduce == "resolution":
        side = max(least, _side_for(len(times), block, max_rows))
    elif rows_of_frame(side, block) > max_rows:
        side = max(least, _side_for(1, block, max_rows))
    kept = max_rows // rows_of_frame(side, block)
    if kept == 0:
        raise ValueError(f"a frame has {rows_of_frame(side, block)} visual rows at least")
    if kept >= len(times):
        return tuple(times), side
    last = len(times) - 1
    numbers = [round(n * last / (kept - 1)) for n in range(kept)] if kept > 1 else [0]
    return tuple(times[number] for number in numbers), side


def _side_for(frames: int, block: int, max_rows: int) -> int:
    """The largest multiple of `block` with which so many frames fit; 0: none."""
    return math.isqrt(max_rows // frames) * block
