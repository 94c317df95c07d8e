"""Row groups of parquet files, kept in memory up to a number of bytes for all files together."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any


class RowGroups:
    """The Arrow tables used last, however many files they come from.

    Attributes:
        kept: Bytes of the tables that are kept.
    """

    def __init__(self, budget: int) -> None:
        """Starts empty.

        Args:
            budget: Bytes that are kept; the newest table stays even if it alone is larger.
        """
        self.kept = 0
        self._budget = budget
        self._tables: OrderedDict[tuple[object, int], Any] = OrderedDict()
        self._lock = threading.Lock()  # readers are threads

    def get(self, file: object, group: int) -> Any | None:
        """A table that is kept, or None."""
        with self._lock:
            table = self._tables.get((file, group))
            if table is not None:
                self._tables.move_to_end((file, group))
            return table

    def put(self, file: object, group: int, table: Any) -> None:
        """Keeps a table that is not there; those not used longest make room for it."""
        with self._lock:
            self._tables[file, group] = table
            self.kept += table.nbytes
            while self.kept > self._budget and len(self._tables) > 1:
                self.kept -= self._tables.popitem(last=False)[1].nbytes

    def drop(self, file: object) -> None:
        """Forgets the tables of a file."""
        with self._lock:
            for key in [key for key in self._tables if key[0] is file]:
                self.kept -= self._tables.pop(key).nbytes
