"""Numbers as people read them: durations and rates, in progress lines and reports."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """1h 02m, 3m 05s or 7s."""
    seconds = max(0, round(seconds))
    if seconds >= 3600:
        return f"{seconds // 3600}h {seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m {seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"


def rate(value: float) -> str:
    """Three significant digits, thousands as k: 87.2, 4.1k, 1.2M."""
    for limit, unit in ((1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.1f}{unit}"
    return f"{value:.1f}"
