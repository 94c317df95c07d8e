"""How even the work of packs is over context parallel ranks, for the statistics page.

Ranks wait for each other in every layer of every pack, so it is each pack that must be even. Text
rows are divided by the model's own rule (`layers.context`), tiles by the tower's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dattn_mcore.config.checks import row_multiple
from dattn_mcore.config.schema import Config
from dattn_mcore.layers.context import share_of
from dattn_mcore.layers.layout import build_seq_params
from dattn_mcore.models.tile_share import tiles_of_rank
from dattn_mcore.types import Layout, T2VPosition, visual_units

KINDS = ("visual rows", "tower tiles", "causal pairs of text", "pairs of text and visual rows")


@dataclass(frozen=True)
class PackLayout:
    """A pack, as the model sees it.

    Attributes:
        layouts: runs of each sample.
        images_of: visual unit of each (`types.visual_units`).
    """

    layouts: tuple[Layout, ...]
    images_of: tuple[int, ...] = ()


@dataclass(frozen=True)
class ContextBalance:
    """Of several packs.

    Attributes:
        ranks: of the context parallel group.
        tiles: of each pack.
        heaviest: for each kind of `KINDS` what the heaviest rank has over the ranks' mean, of each
            pack that has any.
    """

    ranks: int
    tiles: tuple[int, ...]
    heaviest: dict[str, tuple[float, ...]]

    @property
    def without_tile(self) -> float:
        """Share of the packs with images that leave a rank without a tile."""
        shown = [tiles for tiles in self.tiles if tiles]
        return sum(tiles < self.ranks for tiles in shown) / max(len(shown), 1)

    @property
    def most_ranks(self) -> int:
        """Ranks that all have a tile in half of the packs with images, or more."""
        shown = sorted((tiles for tiles in self.tiles if tiles), reverse=True)
        return shown[(len(shown) - 1) // 2] if shown else 1


def rank_loads(
    pack: PackLayout, *, ranks: int, rows_per_tile: int, multiple: int, t2v_position: T2VPosition
) -> np.ndarray:
    """int64 [kinds, ranks]: what each rank has of `KINDS` in a layer without a window.

    Args:
        pack: its samples.
        ranks: of the context parallel group.
        rows_per_tile: visual rows of each.
        multiple: rows are padded to it (`config.checks.row_multiple`); a multiple of `ranks`.
        t2v_position: where positions of visual rows are.
    """
    params = build_seq_params(
        pack.layouts,
        t2v_position=t2v_position,
        multiple=multiple,
        images_of=pack.images_of,
    )
    visual = sum(visual_units(pack.layouts, pack.images_of))
    tiles = visual // rows_per_tile
    loads = np.zeros((len(KINDS), ranks), dtype=np.int64)
    for rank in range(ranks):
        own = share_of(params, rank, ranks)
        assert own.context is not None
        first = rank * own.num_visual
        causal = sum(
            # The last query sees all keys, each one before it one less.
            chunk.rows * (chunk.k_stop - chunk.k_start) - chunk.rows * (chunk.rows - 1) // 2
            for chunk in own.context.chunks
        )
        across = sum(
            (block.text_stop - block.text_start) * (block.visual_stop - block.visual_start)
            for block in own.context.blocks
        )
        rows = min(max(visual - first, 0), own.num_visual)
        loads[:, rank] = rows, len(tiles_of_rank(tiles, rank, ranks)), causal, across
    return loads


def context_balance(packs: Sequence[PackLayout], config: Config) -> ContextBalance:
    """Measures packs for `parallel.cp`.

    Args:
        packs: at least one, of at least one text row each.
        config: a checked configuration.
    """
    per_tile, ranks = config.model.vision.rows_per_tile, config.parallel.cp
    heaviest: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for pack in packs:
        loads = rank_loads(
            pack,
            ranks=ranks,
            rows_per_tile=per_tile,
            multiple=row_multiple(config),
            t2v_position=config.attention.t2v_position,
        )
        for kind, of_ranks in zip(KINDS, loads, strict=True):
            if of_ranks.any():
                heaviest[kind].append(float(of_ranks.max() / of_ranks.mean()))
    tiles = [sum(visual_units(pack.layouts, pack.images_of)) // per_tile for pack in packs]
    return ContextBalance(
        ranks=ranks,
        tiles=tuple(tiles),
        heaviest={kind: tuple(found) for kind, found in heaviest.items()},
    )


def balance_rows(balance: ContextBalance) -> list[list[str]]:
    """Cells of a table: what is divided, heaviest rank over the mean on average and at most."""
    rows = []
    for kind, found in balance.heaviest.items():
        if found:
            rows.append([kind, f"{np.mean(found):.3f}", f"{max(found):.3f}"])
    return rows


def context_lines(balance: ContextBalance) -> list[str]:
    """What the table says in words, and which `parallel.cp` leaves ranks without a tile."""
    lines = [
        f"heaviest of {balance.ranks} context parallel ranks over the mean, {kind}: {mean} on "
        f"average, {most} at most"
        for kind, mean, most in balance_rows(balance)
    ]
    most = balance.most_ranks
    if balance.without_tile > 0.5:
        lines.append(
            f"parallel.cp={balance.ranks} leaves a rank without a tile in "
            f"{balance.without_tile:.0%} of packs with images; use parallel.cp={most} at most, or "
            "raise data.visual_budget"
        )
    elif any(balance.tiles):
        lines.append(
            f"parallel.cp above {most} leaves a rank without a tile in most packs with images"
        )
    return lines
