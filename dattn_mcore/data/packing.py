"""Which samples share a micro-batch: a pure function that every rank computes alike.

A pack holds samples whose text rows sum to at most the text budget and whose visual rows sum to
at most the visual budget. The plan depends only on the lengths of the global batch, so ranks
need not talk to agree on it.
"""

from __future__ import annotations

from collections.abc import Sequence

Lengths = Sequence[tuple[int, int]]  # (text rows, visual rows) of each sample
Pack = tuple[int, ...]  # sample positions within the global batch, ascending


def plan_packs(
    lengths: Lengths, text_budget: int, visual_budget: int, multiple: int
) -> tuple[Pack, ...]:
    """Distributes samples over as few packs as fit, in a count that is a multiple of `multiple`.

    For each candidate count (from the smallest that the sums allow) two greedy placements are
    tried: largest sample into the least loaded pack (balanced), then largest sample into the
    fullest pack that still takes it (tight). Packing is NP-hard; greedy is within a pack or two.

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
    while True:
        for tight in (False, True):
            packs = _place(lengths, budgets, count, tight)
            if packs is not None:
                return packs
        count += multiple


def split_over_ranks(
    packs: Sequence[Pack], lengths: Lengths, dp_size: int
) -> tuple[tuple[Pack, ...], ...]:
    """Deals packs to data-parallel ranks: the same number each, rows as even as dealing allows.

    Packs are dealt by falling size in snake order (0 1 2 2 1 0 ...).

    Args:
        packs: The plan; its length is a multiple of dp_size.
        lengths: What the plan was made from.
        dp_size: Number of data-parallel ranks.

    Returns:
        For each rank its packs.
    """
    if len(packs) % dp_size:
        raise ValueError(f"{len(packs)} packs cannot be dealt evenly to {dp_size} ranks")
    ranked = sorted(packs, key=lambda pack: (-sum(sum(lengths[i]) for i in pack), pack))
    shares: list[list[Pack]] = [[] for _ in range(dp_size)]
    for turn in range(0, len(ranked), dp_size):
        deal = ranked[turn : turn + dp_size]
        if (turn // dp_size) % 2:
            deal = deal[::-1]
        for share, pack in zip(shares, deal, strict=True):
            share.append(pack)
    return tuple(tuple(share) for share in shares)


def _place(
    lengths: Lengths, budgets: tuple[int, int], count: int, tight: bool
) -> tuple[Pack, ...] | None:
    """Places every sample into one of `count` packs, or returns None where greedy cannot.

    tight=False: falling number of rows, into the pack with the fewest rows that fits.
    tight=True: falling share of the budgets, into the fullest pack that fits.
    """
    text_budget, visual_budget = budgets

    def share(text: int, visual: int) -> float:
        return max(text / text_budget, visual / visual_budget)

    def size(index: int) -> tuple[float, int]:
        text, visual = lengths[index]
        return (-share(text, visual) if tight else -(text + visual), index)

    members: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, 0)] * count
    for index in sorted(range(len(lengths)), key=size):
        text, visual = lengths[index]
        best, best_score = -1, float("inf")
        for pack, (pack_text, pack_visual) in enumerate(loads):
            if pack_text + text > text_budget or pack_visual + visual > visual_budget:
                continue
            score = -share(pack_text, pack_visual) if tight else pack_text + pack_visual
            if score < best_score:
                best, best_score = pack, score
        if best < 0:
            return None
        members[best].append(index)
        loads[best] = (loads[best][0] + text, loads[best][1] + visual)
    return tuple(tuple(sorted(pack)) for pack in members)


def _ceil_div(value: int, divisor: int) -> int:
    return -(-value // divisor)
