"""How full packs get and how even the ranks' work is: for the statistics page and the benchmark."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dattn_mcore.data.balance import pack_rows, split_over_ranks
from dattn_mcore.data.packing import Lengths, make_packs


@dataclass(frozen=True)
class PackingFigures:
    """Of several steps.

    Attributes:
        samples: In each step.
        packs: In each step.
        rows: Text and visual rows of each step, as shares of the budgets of one pack.
        heaviest: Work of each step's heaviest rank over the ranks' mean, less 1.
        shared: Share of all visual rows that are not computed, since samples of a pack share them.
    """

    samples: tuple[int, ...]
    packs: tuple[int, ...]
    rows: tuple[tuple[float, float], ...]
    heaviest: tuple[float, ...]
    shared: float = 0.0

    @property
    def fills(self) -> tuple[float, float]:
        """Share of the text and of the visual budget of all packs that is filled."""
        text, visual = (sum(kind) / sum(self.packs) for kind in zip(*self.rows, strict=True))
        return text, visual


def measure_packing(
    steps: Iterable[Lengths],
    budgets: tuple[int, int],
    dp_size: int,
    work: tuple[float, float],
    units: Iterable[Sequence[int]] = (),
) -> PackingFigures:
    """Packs steps and shares them out as a run does.

    Args:
        steps: (text rows, visual rows) of the samples of each step, at least one step; each fits
            the budgets.
        budgets: Most text and visual rows of a pack.
        dp_size: Data-parallel ranks.
        work: Of one text row and one visual row (`row_work`).
        units: Visual units of the samples of each step (`shared_images`); empty: none is shared.
    """
    samples, packs, rows, heaviest = [], [], [], []
    shown = computed = 0
    for lengths, of_step in itertools.zip_longest(steps, units, fillvalue=()):
        made = make_packs(lengths, *budgets, dp_size)
        samples.append(len(lengths))
        packs.append(len(made))
        text, visual = (sum(pair[kind] for pair in lengths) / budgets[kind] for kind in (0, 1))
        rows.append((text, visual))
        of_ranks = [
            [pack_rows(pack, lengths, of_step) for pack in share]
            for share in split_over_ranks(made, lengths, dp_size, budgets, work, of_step)
        ]
        loads = [
            sum(text * work[0] + visual * work[1] for text, visual in of_rank)
            for of_rank in of_ranks
        ]
        heaviest.append(max(loads) * dp_size / max(sum(loads), 1e-9) - 1)
        shown += sum(visual for _, visual in lengths)
        computed += sum(visual for of_rank in of_ranks for _, visual in of_rank)
    return PackingFigures(
        samples=tuple(samples),
        packs=tuple(packs),
        rows=tuple(rows),
        heaviest=tuple(heaviest),
        shared=1 - computed / shown if shown else 0.0,
    )
