"""The packing as it is defined: every sample asks every pack, in plain Python.

`dattn_mcore.data.packing` must place every sample where this does, or a resumed run would see other
packs than the run before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Lengths = Sequence[tuple[int, int]]  # (text rows, visual rows) of each sample
Pack = tuple[int, ...]
Order = Callable[[int, int, tuple[int, int]], float]
Score = Callable[[int, int, int, int, tuple[int, int]], float]


def pack_into(lengths: Lengths, budgets: tuple[int, int], count: int) -> tuple[Pack, ...] | None:
    """Distributes samples over `count` packs, or returns None where no placement tried can."""
    for order, score in GREEDY:
        packs = place(lengths, budgets, count, order, score)
        if packs is not None:
            return packs
    return place_by_sums(lengths, budgets, count)


def place_by_sums(
    lengths: Lengths, budgets: tuple[int, int], count: int
) -> tuple[Pack, ...] | None:
    """Fills pack after pack with images that sum up to the visual budget as nearly as can be.

    Images come in a few sizes, so that taking the largest first leaves gaps that no image fits:
    5 + 5 + 5 of 16 tiles, where 5 + 5 + 3 + 3 would be full. Each pack gets one of the largest
    images left, and of all sums beside it the best.
    """
    by_rows: dict[int, list[int]] = {}  # visual rows: samples, those of most text last
    for index in sorted(range(len(lengths)), key=lambda i: (lengths[i][0], -i)):
        by_rows.setdefault(lengths[index][1], []).append(index)
    text_only = by_rows.pop(0, [])
    members: list[list[int]] = []
    for _ in range(count):
        sizes = {rows: len(samples) for rows, samples in by_rows.items() if samples}
        pack: list[int] = []
        for rows, times in _best_sum(sizes, budgets[1]).items():
            # Long and short texts in turn, so that packs are alike in text.
            pack += [by_rows[rows].pop(-1 if turn % 2 else 0) for turn in range(times)]
        members.append(pack)
    texts = [sum(lengths[index][0] for index in pack) for pack in members]
    for index in reversed(text_only):
        emptiest = texts.index(min(texts))
        members[emptiest].append(index)
        texts[emptiest] += lengths[index][0]
    if any(by_rows.values()) or max(texts) > budgets[0]:
        return None
    return tuple(tuple(sorted(pack)) for pack in members)


def _best_sum(sizes: dict[int, int], room: int) -> dict[int, int]:
    """How often to take each size, the largest at least once, to come nearest to `room`.

    Args:
        sizes: How often each can be taken.
        room: What the sum must not exceed.
    """
    found: dict[int, dict[int, int]] = {0: {}}  # sum: how it is made
    for size in sorted(sizes, reverse=True):
        for total, taken in list(found.items()):
            for times in range(1, min(sizes[size], (room - total) // size) + 1):
                found.setdefault(total + times * size, {**taken, size: times})
        found.pop(0, None)  # the largest is in every sum
    return found[max(found)] if found else {}


def place(
    lengths: Lengths, budgets: tuple[int, int], count: int, order: Order, score: Score
) -> tuple[Pack, ...] | None:
    """Places every sample into one of `count` packs, or returns None where greedy cannot.

    Args:
        lengths: Rows of each sample.
        budgets: Most text and visual rows of a pack.
        count: Packs.
        order: Samples with the largest of it come first.
        score: Of the packs that still take a sample, the one with the lowest gets it.
    """
    text_budget, visual_budget = budgets
    members: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, 0)] * count
    keys = [order(text, visual, budgets) for text, visual in lengths]
    for index in sorted(range(len(lengths)), key=lambda i: (-keys[i], i)):
        text, visual = lengths[index]
        best, best_score = -1, float("inf")
        for pack, (pack_text, pack_visual) in enumerate(loads):
            if pack_text + text > text_budget or pack_visual + visual > visual_budget:
                continue
            found = score(text, visual, pack_text, pack_visual, budgets)
            if found < best_score:
                best, best_score = pack, found
        if best < 0:
            return None
        members[best].append(index)
        loads[best] = (loads[best][0] + text, loads[best][1] + visual)
    return tuple(tuple(sorted(pack)) for pack in members)


def _rows(text: int, visual: int, _: tuple[int, int]) -> float:
    return text + visual


def _largest_share(text: int, visual: int, budgets: tuple[int, int]) -> float:
    return max(text / budgets[0], visual / budgets[1])


def _both_shares(text: int, visual: int, budgets: tuple[int, int]) -> float:
    return text / budgets[0] + visual / budgets[1]


def _emptiest(text: int, visual: int, in_text: int, in_visual: int, _: tuple[int, int]) -> float:
    return in_text + in_visual


def _fullest(
    text: int, visual: int, in_text: int, in_visual: int, budgets: tuple[int, int]
) -> float:
    return -_largest_share(in_text, in_visual, budgets)


def _best_match(
    text: int, visual: int, in_text: int, in_visual: int, budgets: tuple[int, int]
) -> float:
    """Low where what the pack has left has the proportions of what the sample needs."""
    left_text, left_visual = 1 - in_text / budgets[0], 1 - in_visual / budgets[1]
    match = text / budgets[0] * left_text + visual / budgets[1] * left_visual
    return -match / max((left_text**2 + left_visual**2) ** 0.5, 1e-9)


# Balanced first: where it fits, the packs of a step are alike, which a pipeline likes best.
GREEDY: tuple[tuple[Order, Score], ...] = (
    (_rows, _emptiest),
    (_largest_share, _fullest),
    (_both_shares, _best_match),
    (_largest_share, _best_match),
    (_both_shares, _fullest),
)
