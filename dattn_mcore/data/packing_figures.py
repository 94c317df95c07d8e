"""How full packs get and how even the ranks' work is: for the statistics page and the benchmark."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dattn_mcore.data.balance import split_over_ranks
from dattn_mcore.data.packing import Lengths, plan_packs


@dataclass(frozen=True)
class PackingFigures:
    """Of several steps.

    Attributes:
        steps: How many.
        samples: In all of them.
        packs: In all of them.
        fills: Share of the text and of the visual budget of all packs that is filled.
        heaviest: Work of a step's heaviest rank over the ranks' mean, less 1; the worst step's.
    """

    steps: int
    samples: int
    packs: int
    fills: tuple[float, float]
    heaviest: float


def measure_packing(
    steps: Iterable[Lengths], budgets: tuple[int, int], dp_size: int, work: tuple[float, float]
) -> PackingFigures:
    """Packs steps and shares them out as a run does.

    Args:
        steps: (text rows, visual rows) of the samples of each step; each fits the budgets.
        budgets: Most text and visual rows of a pack.
        dp_size: Data-parallel ranks.
        work: Of one text row and one visual row (`row_work`).
    """
    count = samples = packs = text = visual = 0
    heaviest = 0.0
    for lengths in steps:
        made = plan_packs(lengths, *budgets, dp_size)
        count, samples, packs = count + 1, samples + len(lengths), packs + len(made)
        text += sum(rows for rows, _ in lengths)
        visual += sum(rows for _, rows in lengths)
        loads = [
            sum(lengths[i][0] * work[0] + lengths[i][1] * work[1] for pack in share for i in pack)
            for share in split_over_ranks(made, lengths, dp_size, budgets, work)
        ]
        heaviest = max(heaviest, max(loads) * dp_size / max(sum(loads), 1e-9) - 1)
    fills = (text / max(packs, 1) / budgets[0], visual / max(packs, 1) / budgets[1])
    return PackingFigures(count, samples, packs, fills, heaviest)
