"""How full packs get and how even the ranks' work is: for the statistics page and the benchmark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dattn_mcore.data.balance import pack_rows, split_over_ranks
from dattn_mcore.data.packing import Lengths, Pack
from dattn_mcore.data.shared_packing import make_shared_packs, visual_rows


@dataclass(frozen=True)
class StepSamples:
    """Samples of a step, before they are packed.

    Attributes:
        lengths: (text rows, visual rows) of each; each fits the budgets.
        units: Visual unit of each (`shared_images.units_of`); empty: none shares any.
    """

    lengths: Lengths
    units: Sequence[int] = ()


@dataclass(frozen=True)
class PackingFigures:
    """Of several steps.

    Attributes:
        samples: In each step.
        packs: In each step.
        rows: Text and computed visual rows of each step, as shares of the budgets of one pack.
        heaviest: Work of each step's heaviest rank over the ranks' mean, less 1.
        shown: Visual rows of each step's samples.
        computed: Those of them that its packs compute: fewer where samples share images.
        made: Packs of each step, rank after rank: numbers of its samples.
    """

    samples: tuple[int, ...]
    packs: tuple[int, ...]
    rows: tuple[tuple[float, float], ...]
    heaviest: tuple[float, ...]
    shown: tuple[int, ...]
    computed: tuple[int, ...]
    made: tuple[tuple[Pack, ...], ...]

    @property
    def fills(self) -> tuple[float, float]:
        """Share of the text and of the visual budget of all packs that is filled."""
        text, visual = (sum(kind) / sum(self.packs) for kind in zip(*self.rows, strict=True))
        return text, visual

    @property
    def saved(self) -> float:
        """Share of the samples' visual rows that need not be computed."""
        return 1 - sum(self.computed) / max(sum(self.shown), 1)


def measure_packing(
    steps: Iterable[StepSamples],
    budgets: tuple[int, int],
    dp_size: int,
    work: tuple[float, float],
) -> PackingFigures:
    """Packs steps and shares them out as a run does.

    Args:
        steps: Samples of each step, at least one step.
        budgets: Most text and visual rows of a pack.
        dp_size: Data-parallel ranks.
        work: Of one text row and one visual row (`row_work`).
    """
    samples, packs, rows, heaviest, shown, computed = [], [], [], [], [], []
    every: list[tuple[Pack, ...]] = []
    for step in steps:
        lengths, units = step.lengths, step.units or range(len(step.lengths))
        made = make_shared_packs(lengths, units, budgets, dp_size)
        shares = split_over_ranks(made, lengths, dp_size, budgets, work, step.units)
        every.append(tuple(pack for share in shares for pack in share))
        samples.append(len(lengths))
        packs.append(len(made))
        shown.append(sum(visual for _, visual in lengths))
        computed.append(visual_rows([pack for share in shares for pack in share], lengths, units))
        text = sum(text for text, _ in lengths)
        rows.append((text / budgets[0], computed[-1] / budgets[1]))
        loads = []
        for share in shares:
            of_packs = [pack_rows(pack, lengths, step.units) for pack in share]
            loads.append(sum(text * work[0] + visual * work[1] for text, visual in of_packs))
        heaviest.append(max(loads) * dp_size / max(sum(loads), 1e-9) - 1)
    return PackingFigures(
        samples=tuple(samples),
        packs=tuple(packs),
        rows=tuple(rows),
        heaviest=tuple(heaviest),
        shown=tuple(shown),
        computed=tuple(computed),
        made=tuple(every),
    )
