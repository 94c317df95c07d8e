"""The table that ends `check`: what each source was taken for, and what of it is left aside."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dattn_mcore.data.index.store import Index
from dattn_mcore.data.sources.record import GREETING

_HEADS = ("source", "form", "file", "samples", "unusable", "left aside as metadata")


def source_table(index: Index) -> list[str]:
    """One line a source below a line of heads, in columns.

    Args:
        index: Of the data set.
    """
    rows = [_HEADS]
    usable = np.asarray(index.usable)
    ignored = index.content["ignored_by_source"]
    ranges = index.source_ranges()
    for source, (start, end), names in zip(index.settings.sources, ranges, ignored, strict=True):
        bad = end - start - int(usable[start:end].sum())
        counts = (f"{end - start:,}", f"{bad:,}")
        rows.append((source.name, source.form, source.format, *counts, _counted(names)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADS) - 1)]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    ]


def _counted(ignored: Mapping[str, int]) -> str:
    """In how many samples each kind of metadata stands."""
    unit = " samples"
    parts = []
    for name, count in ignored.items():
        quoted = name if name == GREETING else f"'{name}'"
        parts.append(f"{quoted} in {count:,}{unit}")
        unit = ""
    return ", ".join(parts) or "nothing"
