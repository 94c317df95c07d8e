"""How full packs get and how even the ranks' work is: for the statistics page and the benchmark."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dattn_mcore.data.balance import split_over_ranks
from dattn_mcore.data.packing import Lengths, make_packs


@dataclass(frozen=True)
class PackingFigures:
    """Of several steps.

    Attributes:
        samples: In each step.
        packs: In each step.
        rows: Text and visual rows of each step, as shares of the budgets of one pack.
        heaviest: Work of each step's heaviest rank over the ranks' mean, less 1.
    """

    samples: tuple[int, ...]
    packs: tuple[int, ...]
    rows: tuple[tuple[float, float], ...]
    heaviest: tuple[float, ...]

    @property
    def fills(self) -> tuple[float, float]:
        """Share of the text and of the visual budget of all packs that is filled."""
        text, visual = (sum(kind) / sum(self.packs) for kind in zip(*self.rows, strict=True))
        return text, visual


def measure_packing(
    steps: Iterable[Lengths], budgets: tuple[int, int], dp_size: int, work: tuple[float, float]
) -> PackingFigures:
    """Packs steps and shares them out as a run does.

    Args:
        steps: (text rows, visual rows) of the samples of each step, at least one step; each fits
            the budgets.
        budgets: Most text and visual rows of a pack.
        dp_size: Data-parallel ranks.
        work: Of one text row and one visual row (`row_work`).
    """
    samples, packs, rows, heaviest = [], [], [], []
    for lengths in steps:
        made = make_packs(lengths, *budgets, dp_size)
        samples.append(len(lengths))
        packs.append(len(made))
        text, visual = (sum(pair[kind] for pair in lengths) / budgets[kind] for kind in (0, 1))
        rows.append((text, visual))
        loads = [
            sum(lengths[i][0] * work[0] + lengths[i][1] * work[1] for pack in share for i in pack)
            for share in split_over_ranks(made, lengths, dp_size, budgets, work)
        ]
        heaviest.append(max(loads) * dp_size / max(sum(loads), 1e-9) - 1)
    return PackingFigures(tuple(samples), tuple(packs), tuple(rows), tuple(heaviest))
