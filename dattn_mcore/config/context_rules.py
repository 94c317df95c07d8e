"""Rules for context parallelism: rows of a micro-batch over `parallel.cp` ranks; a line each."""

from __future__ import annotations

from collections.abc import Iterator

from dattn_mcore.config.schema import Config


def local_rows(config: Config) -> Iterator[str]:
    """Visual rows stay on their rank only where they see no other row."""
    if config.parallel.cp > 1 and config.attention.v2v != "diagonal":
        yield (
            f"parallel.cp={config.parallel.cp} needs attention.v2v=diagonal (visual rows that see "
            f"no other row), got attention.v2v={config.attention.v2v}; use parallel.cp=1, and "
            "parallel.tp and parallel.pp for memory"
        )


def tiles(config: Config) -> Iterator[str]:
    """The vision tower's work is divided by whole tiles: a micro-batch must hold one a rank."""
    cp, rows = config.parallel.cp, config.model.vision.rows_per_tile
    if cp == 1 or rows == 0:  # an image smaller than a patch breaks another rule
        return
    held = config.data.visual_budget // rows
    if held < cp:
        yield (
            f"data.visual_budget={config.data.visual_budget} holds {held} of {rows} rows a tile, "
            f"so ranks of parallel.cp={cp} would have no tile in any micro-batch; set it to "
            f"{cp * rows} at least, or use parallel.cp={max(held, 1)}"
        )
