"""Where the numbers of a run go: one small class for each place, on rank 0 only."""

from __future__ import annotations
