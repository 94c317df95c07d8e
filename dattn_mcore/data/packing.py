"""Which samples share a micro-batch: a pure function that every rank computes alike.

A pack holds samples whose text rows sum to at most the text budget and whose visual rows sum to
at most the visual budget. The packs depend only on the lengths of the global batch, so ranks
need not talk to agree on it.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence

from dattn_mcore.data.open_packs import BestMatch, Emptiest, Fullest, OpenPacks

Lengths = Sequence[tuple[int, int]]  # (text rows, visual rows) of each sample
Pack = tuple[int, ...]  # sample positions within the global batch, ascending
Order = Callable[[int, int, tuple[int, int]], float]


def make_packs(
    lengths: Lengths, text_budget: int, visual_budget: int, multiple: int
) -> tuple[Pack, ...]:
    """Distributes samples over as few packs as fit, in a count that is a multiple of `multiple`.

    For each candidate count (from the smallest that the sums allow) greedy placements are tried:
    largest sample into the least loaded pack (balanced), then in several orders into the pack that
    it fits best (tight), then sums of images that fill the visual budget. Packing is NP-hard; one
    of them nearly always reaches the smallest count that the sums allow (see
    benchmarks/data_path.py).

    Args:
        lengths: (text rows, visual rows) of each sample. Each fits the budgets alone.
        text_budget: Most text rows of a pack.
        visual_budget: Most visual rows of a pack.
        multiple: The count of packs is a positive multiple of this.

    Returns:
        The packs. Some are empty where there are fewer samples than packs.

    Raises:
        ValueError: A sample fits no pack.
    """
    for text, visual in lengths:
        if text > text_budget or visual > visual_budget:
            raise ValueError(f"a sample of {text} text and {visual} visual rows fits no pack")
    budgets = (text_budget, visual_budget)
    need = max(
        _ceil_div(sum(text for text, _ in lengths), text_budget),
        _ceil_div(sum(visual for _, visual in lengths), visual_budget),
        1,
    )
    count = _ceil_div(need, multiple) * multiple
    while (packs := pack_into(lengths, budgets, count)) is None:
        count += multiple
    return packs


def pack_into(lengths: Lengths, budgets: tuple[int, int], count: int) -> tuple[Pack, ...] | None:
    """Distributes samples over `count` packs, or returns None where no placement tried can."""
    for order, kind in _GREEDY:
        packs = _place(lengths, budgets, count, order, kind)
        if packs is not None:
            return packs
    return _place_by_sums(lengths, budgets, count)


def _place_by_sums(
    lengths: Lengths, budgets: tuple[int, int], count: int
) -> tuple[Pack, ...] | None:
    """Fills pack after pack with images that sum up to the visual budget as nearly as can be.

    Images come in a few sizes, so that taking the largest first leaves gaps that no image fits:
    5 + 5 + 5 of 16 tiles, where 5 + 5 + 3 + 3 would be full. Each pack gets one of the largest
    images left, and of all sums beside it the best.
    """
    by_rows: dict[int, deque[int]] = {}  # visual rows: samples, those of most text last
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i][0], -i)):
        by_rows.setdefault(lengths[index][1], deque()).append(index)
    text_only = by_rows.pop(0, deque())
    members: list[list[int]] = []
    best: dict[tuple[tuple[int, int], ...], dict[int, int]] = {}
    for _ in range(count):
        # More of a size than fit into a pack are no other choice, so packs mostly have the same.
        sizes = {
            rows: min(len(samples), budgets[1] // rows)
            for rows, samples in by_rows.items()
            if samples
        }
        choice = tuple(sizes.items())
        if choice not in best:
            best[choice] = _best_sum(sizes, budgets[1])
        pack: list[int] = []
        for rows, times in best[choice].items():
            # Long and short texts in turn, so that packs are alike in text.
            samples = by_rows[rows]
            pack += [samples.pop() if turn % 2 else samples.popleft() for turn in range(times)]
        members.append(pack)
    texts = [(sum(lengths[index][0] for index in pack), at) for at, pack in enumerate(members)]
    heapq.heapify(texts)
    while text_only:
        index = text_only.pop()
        text, emptiest = texts[0]
        members[emptiest].append(index)
        heapq.heapreplace(texts, (text + lengths[index][0], emptiest))
    if any(by_rows.values()) or max(texts)[0] > budgets[0]:
        return None
    return tuple(tuple(sorted(pack)) for pack in members)


def _best_sum(sizes: dict[int, int], room: int) -> dict[int, int]:
    """How often to take each size, the largest at least once, to come nearest to `room`.

    Args:
        sizes: How often each can be taken.
        room: What the sum must not exceed.
    """
    # A sum: the sum before, and the size that was added so often. The first way to make one stays.
    found: dict[int, tuple[int, int, int]] = {0: (0, 0, 0)}
    made: dict[int, int] = {}
    unit = math.gcd(*sizes)
    full = room // unit * unit if unit else 0  # no sum is nearer
    for size in sorted(sizes, reverse=True):
        for total in list(found):
            for times in range(1, min(sizes[size], (room - total) // size) + 1):
                found.setdefault(total + times * size, (total, size, times))
        found.pop(0, None)  # the largest is in every sum
        if full in found:
            break
    total = max(found, default=0)
    while total:
        total, size, times = found[total]
        made[size] = times
    return dict(reversed(made.items()))


def _place(
    lengths: Lengths, budgets: tuple[int, int], count: int, order: Order, kind: type[OpenPacks]
) -> tuple[Pack, ...] | None:
    """Places every sample into one of `count` packs, or returns None where greedy cannot.

    Args:
        lengths: Rows of each sample.
        budgets: Most text and visual rows of a pack.
        count: Packs.
        order: Samples with the largest of it come first.
        kind: Which of the packs that still take a sample gets it.
    """
    packs = kind(budgets, count)
    keys = [order(text, visual, budgets) for text, visual in lengths]
    for index in sorted(range(len(lengths)), key=lambda i: (-keys[i], i)):
        if not packs.place(index, *lengths[index]):
            return None
    return tuple(tuple(sorted(pack)) for pack in packs.members)


def _rows(text: int, visual: int, _: tuple[int, int]) -> float:
    return text + visual


def _largest_share(text: int, visual: int, budgets: tuple[int, int]) -> float:
    return max(text / budgets[0], visual / budgets[1])


def _both_shares(text: int, visual: int, budgets: tuple[int, int]) -> float:
    return text / budgets[0] + visual / budgets[1]


# Balanced first: where it fits, the packs of a step are alike, which a pipeline likes best.
_GREEDY: tuple[tuple[Order, type[OpenPacks]], ...] = (
    (_rows, Emptiest),
    (_largest_share, Fullest),
    (_both_shares, BestMatch),
    (_largest_share, BestMatch),
    (_both_shares, Fullest),
)


def _ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)
