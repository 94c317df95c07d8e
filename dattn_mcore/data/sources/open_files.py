"""The files of an index that are open, those used last to the end."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

from dattn_mcore.data.sources.source import Source, SourceFile, open_source_file


class OpenFiles:
    """Opens an index's files as they are needed; threads may share it.

    Args:
        files: (number within its source, source) of each file.
        most: files that stay open after `make_room`; shards can be thousands.
        in_order: records are read in the order in which they stand.
    """

    def __init__(
        self, files: Sequence[tuple[int, Source]], most: int, in_order: bool = False
    ) -> None:
        self._described, self._most, self._in_order = files, most, in_order
        self._open: OrderedDict[int, SourceFile] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, number: int) -> SourceFile:
        """A file, opened if it is not.

        Raises:
            DataError: it cannot be opened.
        """
        with self._lock:
            if number not in self._open:
                within, source = self._described[number]
                self._open[number] = open_source_file(source, within, in_order=self._in_order)
            self._open.move_to_end(number)
            return self._open[number]

    def make_room(self) -> None:
        """Closes files not used lately; only while nobody reads one."""
        while len(self._open) > self._most:
            self._open.popitem(last=False)[1].close()

    def close(self) -> None:
        """Closes all files."""
        for file in self._open.values():
            file.close()
        self._open.clear()
