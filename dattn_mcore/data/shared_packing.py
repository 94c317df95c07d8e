"""Packs of samples of which some show the same images: a pack counts their visual rows once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dattn_mcore.data.packing import Lengths, Pack, make_packs, pack_into
from dattn_mcore.types import NO_IMAGES

# Largest text of samples that stay together, as a share of the budget. Smaller parts fill packs
# better and compute more visual rows.
_SHARES = (1.0, 0.5, 0.25)


def make_shared_packs(
    lengths: Lengths, units: Sequence[int], budgets: tuple[int, int], multiple: int
) -> tuple[Pack, ...]:
    """Distributes samples over few packs, those of one visual unit together where they fit.

    Args:
        lengths: (text rows, visual rows) of each sample. Each fits the budgets alone.
        units: Visual unit of each sample (`shared_images.units_of`).
        budgets: Most text and visual rows of a pack; those of a unit count once.
        multiple: The count of packs is a positive multiple of this.

    Returns:
        The packs: of several ways to make them the one with the fewest, and of those with equally
        many the one that computes the fewest visual rows. Never more than without sharing.

    Raises:
        ValueError: A sample fits no pack.
    """
    return _best(lengths, units, budgets, lambda parts: make_packs(parts, *budgets, multiple))


def shared_pack_into(
    lengths: Lengths, units: Sequence[int], budgets: tuple[int, int], count: int
) -> tuple[Pack, ...] | None:
    """The same for a given count of packs; None where no way that is tried can."""
    ways = _ways(lengths, units, budgets, lambda parts: pack_into(parts, budgets, count))
    return min(ways, key=lambda packs: visual_rows(packs, lengths, units), default=None)


def visual_rows(packs: Sequence[Pack], lengths: Lengths, units: Sequence[int]) -> int:
    """Visual rows that packs compute, those of a unit once in each pack."""
    return sum(sum({units[i]: lengths[i][1] for i in pack}.values()) for pack in packs)


def _best(
    lengths: Lengths,
    units: Sequence[int],
    budgets: tuple[int, int],
    pack: Callable[[Lengths], tuple[Pack, ...] | None],
) -> tuple[Pack, ...]:
    ways = _ways(lengths, units, budgets, pack)
    return min(ways, key=lambda packs: (len(packs), visual_rows(packs, lengths, units)))


def _ways(
    lengths: Lengths,
    units: Sequence[int],
    budgets: tuple[int, int],
    pack: Callable[[Lengths], tuple[Pack, ...] | None],
) -> list[tuple[Pack, ...]]:
    """Packs of the parts that units can be divided into, and of the samples one by one."""
    divided = [_parts(lengths, units, int(share * budgets[0])) for share in _SHARES]
    alone = tuple((i,) for i in range(len(lengths)))
    found = []
    for parts in dict.fromkeys([*divided, alone]):
        rows = [
            (sum(lengths[i][0] for i in part), max(lengths[i][1] for i in part)) for part in parts
        ]
        packs = pack(rows)
        if packs is not None:
            found.append(
                tuple(tuple(sorted(i for number in one for i in parts[number])) for one in packs)
            )
    return found


def _parts(lengths: Lengths, units: Sequence[int], most: int) -> tuple[Pack, ...]:
    """Samples of one unit together, as long as they have at most `most` text rows."""
    parts: list[list[int]] = []
    open_part: dict[int, int] = {}  # of a unit
    text: list[int] = []
    for i, ((rows, _), unit) in enumerate(zip(lengths, units, strict=True)):
        part = open_part.get(unit)
        if unit == NO_IMAGES or part is None or text[part] + rows > most:
            part = open_part[unit] = len(parts)
            parts.append([])
            text.append(0)
        parts[part].append(i)
        text[part] += rows
    return tuple(tuple(part) for part in parts)
