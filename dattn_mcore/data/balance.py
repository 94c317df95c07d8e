"""Divides the packs of a step among data-parallel ranks so that all have nearly the same work.

All ranks wait for the slowest at the end of a step. Packs are assigned by falling work in snake
order (0 1 2 2 1 0 ...); then samples are moved or exchanged between the heaviest and the lightest
rank as long as that helps. A pure function of the lengths, so ranks need not talk to agree on it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dattn_mcore.architectures import tower_features
from dattn_mcore.config.schema import Config
from dattn_mcore.data.packing import Lengths, Pack

_CLOSE_ENOUGH = 1.02  # work of the heaviest rank, relative to the mean
_MOST_MOVES = 500


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


def split_over_ranks(
    packs: Sequence[Pack],
    lengths: Lengths,
    dp_size: int,
    budgets: tuple[int, int],
    work: tuple[float, float] = (1.0, 1.0),
) -> tuple[tuple[Pack, ...], ...]:
    """Divides packs among ranks: the same number each, work as even as can be had.

    Args:
        packs: Of a step; their number is a multiple of dp_size.
        lengths: (text rows, visual rows) of each sample; what the packs were made from.
        dp_size: Number of data-parallel ranks.
        budgets: Most text and visual rows of a pack.
        work: Of one text row and one visual row.

    Returns:
        For each rank its packs.
    """
    if len(packs) % dp_size:
        raise ValueError(f"{len(packs)} packs cannot be divided evenly among {dp_size} ranks")
    works = [text * work[0] + visual * work[1] for text, visual in lengths]
    ranked = sorted(packs, key=lambda pack: (-sum(works[i] for i in pack), pack))
    shares: list[list[Pack]] = [[] for _ in range(dp_size)]
    for turn in range(0, len(ranked), dp_size):
        turn_packs = ranked[turn : turn + dp_size]
        if (turn // dp_size) % 2:
            turn_packs = turn_packs[::-1]
        for share, pack in zip(shares, turn_packs, strict=True):
            share.append(pack)
    _even_out(shares, np.array(lengths, np.int64).reshape(-1, 2), np.array(works), budgets)
    return tuple(tuple(share) for share in shares)


def _even_out(
    shares: list[list[Pack]], rows: np.ndarray, works: np.ndarray, budgets: tuple[int, int]
) -> None:
    """Moves and exchanges samples between the heaviest and the lightest rank, in place."""
    loads = np.array([sum(works[i] for pack in share for i in pack) for share in shares])
    for _ in range(_MOST_MOVES):
        heavy, light = int(loads.argmax()), int(loads.argmin())
        if loads[heavy] <= _CLOSE_ENOUGH * loads.mean():
            return
        moved = _exchange(
            shares[heavy], shares[light], rows, works, budgets, loads[heavy] - loads[light]
        )
        if moved <= 0:
            return
        loads[heavy] -= moved
        loads[light] += moved


def _exchange(
    heavy: list[Pack],
    light: list[Pack],
    rows: np.ndarray,
    works: np.ndarray,
    budgets: tuple[int, int],
    gap: float,
) -> float:
    """Does the exchange that comes nearest to closing a gap; returns the work it moved, or 0."""
    giving = [(pack, i) for pack, members in enumerate(heavy) for i in members]
    taking = [(pack, i) for pack, members in enumerate(light) for i in (*members, -1)]
    if not giving:
        return 0.0
    # Index -1 is no sample: the one given is moved, and nothing comes back.
    rows, works = np.vstack([rows, [[0, 0]]]), np.append(works, 0.0)
    give, take = np.array([i for _, i in giving]), np.array([i for _, i in taking])
    moved = works[give][:, None] - works[take][None, :]
    change = rows[give][:, None] - rows[take][None, :]
    heavy_rows = np.array([rows[list(heavy[pack])].sum(0) for pack, _ in giving])
    light_rows = np.array([rows[list(light[pack])].sum(0) for pack, _ in taking])
    fits = (heavy_rows[:, None] - change <= budgets).all(-1)
    fits &= (light_rows[None, :] + change <= budgets).all(-1)
    fits &= (moved > 0) & (moved < gap)
    if not fits.any():
        return 0.0
    miss = np.where(fits, np.abs(moved - gap / 2), np.inf)
    best_give, best_take = np.unravel_index(int(miss.argmin()), miss.shape)
    (from_pack, given), (to_pack, taken) = giving[best_give], taking[best_take]
    heavy[from_pack] = _with(heavy[from_pack], given, taken)
    light[to_pack] = _with(light[to_pack], taken, given)
    return float(moved[best_give, best_take])


def _with(pack: Pack, without: int, added: int) -> Pack:
    """A pack after an exchange; -1 stands for no sample."""
    kept = [i for i in pack if i != without]
    return tuple(sorted(kept + ([added] if added >= 0 else [])))
