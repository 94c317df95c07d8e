"""Which samples of a micro-batch show the same images, and whether their visual rows can be shared.

With V2V diagonal and without positions in T2V a visual row's path through all layers depends on
its image alone. So samples that show the same images, in the same order, can share their tiles and
visual rows: decoded once, encoded once, and carried once through the layers. It is the same
function; a shared row's gradient is the sum over the samples that see it. Samples whose images
overlap in part only stay apart.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

from dattn_mcore.types import NO_IMAGES

if TYPE_CHECKING:  # one imports torch, which takes seconds, and the planner needs none of it
    from dattn_mcore.data.fitted_sample import FittedSample


def units_of(samples: Sequence[FittedSample], *, shares: bool) -> list[int]:
    """Numbers the visual units of samples: equal where samples show the same images alike.

    Args:
        samples: Cut to the budget, so that images behind a cut do not count.
        shares: Whether samples may share images (`why_apart`); if not, each has a unit of its own.

    Returns:
        For each sample its unit, by first appearance; `NO_IMAGES` for one of text alone.
    """
    units: dict[Hashable, int] = {}
    found = []
    for number, sample in enumerate(samples):
        if not sample.images:
            found.append(NO_IMAGES)
            continue
        # Tiles and grids, too: rows are shared where they are the same, whatever made them so.
        shown = tuple((image.identity, image.num_tiles, image.grid) for image in sample.images)
        found.append(units.setdefault(shown if shares else number, len(units)))
    return found


def images_of(units: Sequence[int]) -> tuple[int, ...]:
    """`MicroBatch.images_of` of the samples of a pack, from their units in the global batch.

    Returns:
        Units numbered anew, by first appearance in the pack; empty where none has two samples.
    """
    shown = [unit for unit in units if unit != NO_IMAGES]
    order = {unit: number for number, unit in enumerate(dict.fromkeys(shown))}
    if len(order) == len(shown):
        return ()
    return tuple(order.get(unit, NO_IMAGES) for unit in units)


def first_of_units(units: Sequence[int]) -> list[int]:
    """Places of the samples whose images stand for their units: the first of each.

    Args:
        units: Of the samples of a pack.
    """
    first: dict[int, int] = {}
    for place, unit in enumerate(units):
        if unit != NO_IMAGES:
            first.setdefault(unit, place)
    return list(first.values())
