"""Divides the packs of a step among data-parallel ranks so that all have nearly the same work.

All ranks wait for the slowest at the end of a step. Packs are assigned by falling work in snake
order (0 1 2 2 1 0 ...); then samples are moved or exchanged between the heaviest and the lightest
rank as long as that helps. A pure function of the lengths, so ranks need not talk to agree on it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from dattn_mcore.architectures import tower_features
from dattn_mcore.config.schema import Config
from dattn_mcore.data.packing import Lengths, Pack
from dattn_mcore.types import NO_IMAGES

_CLOSE_ENOUGH = 1.02  # work of the heaviest rank, relative to the mean
_MOST_MOVES = 500
Move = tuple[int, int]  # number of a pack, and a sample of it
Change = tuple[np.ndarray, np.ndarray]


def row_work(config: Config) -> tuple[float, float]:
    """Forward work of a text row and of a visual row, in multiply-adds.

    Linear layers only: what attention adds depends on neighbours and is small beside them. A visual
    row has no query, a folded output projection, and the tower and projector on top.
    """
    llm, vision = config.model.llm, config.model.vision
    hidden = llm.hidden_size
    query, kv = llm.num_attention_heads * llm.head_dim, llm.num_query_groups * llm.head_dim
    mlp = 3 * hidden * llm.ffn_hidden_size
    text = llm.num_layers * (2 * hidden * query + 2 * hidden * kv + mlp)
    diagonal = config.attention.v2v == "diagonal"
    visual = llm.num_layers * (3 * hidden * kv + mlp) if diagonal else text
    wide = vision.hidden_size
    layers = vision.num_layers + 1 + vision.select_layer
    products = tower_features(config.model).mlp_products
    visual += layers * (4 * wide * wide + products * wide * vision.ffn_hidden_size)
    visual += config.model.projector.ffn_hidden_size * (wide + hidden)
    return float(text), float(visual)


def pack_rows(pack: Pack, lengths: Lengths, units: Sequence[int] = ()) -> tuple[int, int]:
    """Text rows of a pack, and visual rows: those that samples share once.

    Args:
        pack: Its samples.
        lengths: (text rows, visual rows) of each sample.
        units: Visual unit of each sample (`shared_images.units_of`); empty: none shares any.
    """
    text = sum(lengths[i][0] for i in pack)
    if not units:
        return text, sum(lengths[i][1] for i in pack)
    return text, sum({units[i]: lengths[i][1] for i in pack}.values())


def split_over_ranks(
    packs: Sequence[Pack],
    lengths: Lengths,
    dp_size: int,
    budgets: tuple[int, int],
    work: tuple[float, float] = (1.0, 1.0),
    units: Sequence[int] = (),
) -> tuple[tuple[Pack, ...], ...]:
    """Divides packs among ranks: the same number each, work as even as can be had.

    Args:
        packs: Of a step; their number is a multiple of dp_size.
        lengths: (text rows, visual rows) of each sample; what the packs were made from.
        dp_size: Number of data-parallel ranks.
        budgets: Most text and visual rows of a pack.
        work: Of one text row and one visual row.
        units: Visual unit of each sample, whose rows a pack computes once; empty: none is shared.

    Returns:
        For each rank its packs.
    """
    if len(packs) % dp_size:
        raise ValueError(f"{len(packs)} packs cannot be divided evenly among {dp_size} ranks")
    samples = _Samples(lengths, units, work)
    ranked = sorted(packs, key=lambda pack: (-samples.work_of([pack]), pack))
    shares: list[list[Pack]] = [[] for _ in range(dp_size)]
    for turn in range(0, len(ranked), dp_size):
        turn_packs = ranked[turn : turn + dp_size]
        if (turn // dp_size) % 2:
            turn_packs = turn_packs[::-1]
        for share, pack in zip(shares, turn_packs, strict=True):
            share.append(pack)
    _even_out(shares, samples, budgets)
    return tuple(tuple(share) for share in shares)


class _Samples:
    """Rows and work of samples and packs, where samples may have visual rows in common.

    Args:
        lengths: (text rows, visual rows) of each sample.
        units: Visual unit of each; empty: none is shared.
        work: Of one text row and one visual row.
    """

    def __init__(self, lengths: Lengths, units: Sequence[int], work: tuple[float, float]) -> None:
        self.lengths, self._work = lengths, work
        shown = [unit for unit in units if unit != NO_IMAGES]
        self.units = units if len(set(shown)) < len(shown) else ()
        # Index -1 is no sample: without rows, and of no unit.
        self._rows = np.array([*lengths, (0, 0)], np.int64).reshape(-1, 2)
        self._unit = np.array([*(units or range(len(lengths))), -2], np.int64)

    def work_of(self, packs: Sequence[Pack]) -> float:
        """Work of some packs."""
        if not self.units:  # the order of the sum decides its last bit, and with it an exchange
            return sum(float(self._works(self._rows[i])) for pack in packs for i in pack)
        return float(sum(self._works(np.array(self.rows_of(pack))) for pack in packs))

    def rows_of(self, pack: Pack) -> tuple[int, int]:
        """Text and visual rows of a pack."""
        return pack_rows(pack, self.lengths, self.units)

    def exchanged(self, own: list[Move], others: list[Move], packs: list[Pack]) -> Change:
        """What packs lose by giving each of their samples for each sample of another rank.

        Args:
            own: What each of them can give.
            others: What they can get for it.
            packs: Of the one rank.

        Returns:
            Rows, int64 [own, others, 2], and work, [own, others].
        """
        give, get = [i for _, i in own], [i for _, i in others]
        lost = np.repeat(self._rows[give][:, None], len(get), axis=1)
        got = np.repeat(self._rows[get][None], len(give), axis=0)
        if self.units:
            counts = [Counter(self.units[i] for i in pack) for pack in packs]
            unit, at = self._unit, [pack for pack, _ in own]
            stays = [counts[pack][int(unit[i])] > 1 for pack, i in own]
            lost[stays, :, 1] = 0  # others of the pack show the same images
            there = np.array([[int(unit[i]) in count for i in get] for count in counts])
            got[there[at], 1] = 0
            alike = unit[give][:, None] == unit[get][None, :]
            lost[alike, 1] = got[alike, 1] = 0
        return lost - got, self._works(lost) - self._works(got)

    def _works(self, rows: np.ndarray) -> np.ndarray:
        return rows[..., 0] * self._work[0] + rows[..., 1] * self._work[1]


def _even_out(shares: list[list[Pack]], samples: _Samples, budgets: tuple[int, int]) -> None:
    """Moves and exchanges samples between the heaviest and the lightest rank, in place."""
    loads = np.array([samples.work_of(share) for share in shares])
    for _ in range(_MOST_MOVES):
        heavy, light = int(loads.argmax()), int(loads.argmin())
        if loads[heavy] <= _CLOSE_ENOUGH * loads.mean():
            return
        gap = loads[heavy] - loads[light]
        lost, got = _exchange(shares[heavy], shares[light], samples, budgets, gap)
        if lost <= 0:
            return
        loads[heavy] -= lost
        loads[light] += got


def _exchange(
    heavy: list[Pack],
    light: list[Pack],
    samples: _Samples,
    budgets: tuple[int, int],
    gap: float,
) -> tuple[float, float]:
    """Does the exchange that comes nearest to closing a gap.

    Returns:
        Work that the heavy rank lost and that the light one got; 0 where no exchange helps.
    """
    giving = [(pack, i) for pack, members in enumerate(heavy) for i in members]
    taking = [(pack, i) for pack, members in enumerate(light) for i in (*members, -1)]
    if not giving:
        return 0.0, 0.0
    # Index -1 is no sample: the one given is moved, and nothing comes back.
    less, lost = samples.exchanged(giving, taking, heavy)
    back, returned = samples.exchanged(taking, giving, light)
    more, got = -back.swapaxes(0, 1), -returned.T
    heavy_rows = np.array([samples.rows_of(heavy[pack]) for pack, _ in giving])
    light_rows = np.array([samples.rows_of(light[pack]) for pack, _ in taking])
    fits = (heavy_rows[:, None] - less <= budgets).all(-1)
    fits &= (light_rows[None, :] + more <= budgets).all(-1)
    fits &= (lost > 0) & (got < gap)
    if not fits.any():
        return 0.0, 0.0
    # By how much the heavier of the two is above the middle afterwards.
    miss = np.where(fits, np.maximum(gap / 2 - lost, got - gap / 2), np.inf)
    best_give, best_take = np.unravel_index(int(miss.argmin()), miss.shape)
    (from_pack, given), (to_pack, taken) = giving[best_give], taking[best_take]
    heavy[from_pack] = _with(heavy[from_pack], given, taken)
    light[to_pack] = _with(light[to_pack], taken, given)
    return float(lost[best_give, best_take]), float(got[best_give, best_take])


def _with(pack: Pack, without: int, added: int) -> Pack:
    """A pack after an exchange; -1 stands for no sample."""
    kept = [i for i in pack if i != without]
    return tuple(sorted(kept + ([added] if added >= 0 else [])))
