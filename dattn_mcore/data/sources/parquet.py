"""Parquet files as Hugging Face's data sets ship them; see `table.py` for their columns.

A row is read with its row group, so files with small row groups (some hundred rows) serve random
access best; the groups used last are kept, up to 256 MiB of images.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from dattn_mcore.data.sources.metadata import METADATA
from dattn_mcore.data.sources.records.draft import Form
from dattn_mcore.data.sources.records.llava import LLAVA
from dattn_mcore.data.sources.row_groups import RowGroups
from dattn_mcore.data.sources.table import TableFile, arrow_module
from dattn_mcore.errors import DataError

# Of a process, whatever it opens. Apart, or a large group of images would throw out its text.
_TEXTS, _IMAGES = RowGroups(64 << 20), RowGroups(256 << 20)


class ParquetFile(TableFile):
    """A parquet file, as `SourceFile` describes it."""

    def __init__(
        self,
        path: Path,
        image_folder: str,
        in_order: bool = False,
        known: Collection[str] = METADATA,
        form: Form | None = LLAVA,
        called: Path | None = None,
    ) -> None:
        """Opens the file and reads its footer.

        Args:
            path: The file.
            image_folder: Folder of the images that lie beside it.
            in_order: Rows are read in order, so only the newest row group is kept.
            known: Names of metadata.
            form: Of its rows; None: not known yet.
            called: The file as the user named it, where `path` is the unpacked copy of it.

        Raises:
            DataError: It is no parquet file or lacks a column.
            ConfigError: pyarrow is not installed.
        """
        parquet = arrow_module("pyarrow.parquet", f"'{called or path}' is parquet")
        try:
            self._file = parquet.ParquetFile(path)
        except Exception as error:  # noqa: BLE001  (pyarrow raises classes of its own)
            number = getattr(error, "errno", None)
            if number is not None:  # the system's: too many open files, a failing disk
                raise DataError(
                    f"'{called or path}' cannot be read ({os.strerror(number)})"
                ) from None
            reason = " ".join(str(error).split())[:120]
            raise DataError(f"'{called or path}' is no whole parquet file ({reason})") from None
        super().__init__(path, image_folder, self._file.schema_arrow.names, known, form, called)
        self._in_order = in_order
        self._lock = threading.Lock()  # of the file: readers are threads

    def group_rows(self) -> list[int]:
        """Rows of each row group."""
        metadata = self._file.metadata
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def group_sizes(self) -> list[str]:
        """Rows and bytes of each row group."""
        metadata = self._file.metadata
        groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
        return [f"{group.num_rows} {group.total_byte_size}" for group in groups]

    def read_group(self, group: int, columns: Sequence[str]) -> Any:
        """Some columns of a row group."""
        try:
            return self._file.read_row_group(group, columns=list(columns))
        except Exception as error:  # noqa: BLE001  (pyarrow raises classes of its own)
            reason = " ".join(str(error).split())[:120]
            raise DataError(f"row group {group} is damaged ({reason})") from None

    def group_table(self, group: int, images: bool) -> Any:
        """A row group's text, or its images. Whole groups are read and some of them kept."""
        kept, columns = (_IMAGES, self.image_columns()) if images else (_TEXTS, self._text_columns)
        with self._lock:  # so that threads do not read one group twice
            table = kept.get(self, group)
            if table is None:
                if self._in_order:
                    kept.drop(self)
                table = self.read_group(group, columns)
                kept.put(self, group, table)
        return table

    def line(self, offset: int) -> str:
        """Row group."""
        return f"row group {offset}"

    def close(self) -> None:
        """Closes the file."""
        for kept in (_TEXTS, _IMAGES):
            kept.drop(self)
        self._file.close()
