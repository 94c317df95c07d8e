"""Arrow files of `datasets`: its cache, and the folders that `save_to_disk` writes.

The file is mapped, so a row costs what it holds. See `table.py` for the columns.
Source: `datasets` writes Arrow's streaming format; the file format is read too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from dattn_mcore.data.sources.metadata import METADATA
from dattn_mcore.data.sources.records.draft import Form
from dattn_mcore.data.sources.records.llava import LLAVA
from dattn_mcore.data.sources.table import TableFile, arrow_module
from dattn_mcore.errors import DataError

# A continuation mark and the length 0. Source: Arrow's columnar format, IPC streaming format.
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


class ArrowFile(TableFile):
    """An Arrow file, as `SourceFile` describes it."""

    def __init__(
        self,
        path: Path,
        image_folder: str,
        known: Collection[str] = METADATA,
        form: Form | None = LLAVA,
        called: Path | None = None,
    ) -> None:
        """Maps the file.

        Args:
            path: The file.
            image_folder: Folder of the images that lie beside it.
            known: Names of metadata.
            form: Of its rows; None: not known yet.
            called: The file as the user named it, where `path` is the unpacked copy of it.

        Raises:
            DataError: It is no Arrow file or lacks a column.
            ConfigError: pyarrow is not installed.
        """
        self._arrow = arrow_module("pyarrow", f"'{called or path}' is an Arrow file")
        ipc = arrow_module("pyarrow.ipc", f"'{called or path}' is an Arrow file")
        try:
            self._map = self._arrow.memory_map(str(path))
            self._batches, schema = _batches(self._arrow, ipc, self._map)
        except OSError as error:
            number = error.errno
            reason = os.strerror(number) if number else " ".join(str(error).split())[:120]
            raise DataError(f"'{called or path}' cannot be read ({reason})") from None
        except Exception as error:  # noqa: BLE001  (pyarrow raises classes of its own)
            reason = " ".join(str(error).split())[:120]
            raise DataError(f"'{called or path}' is no whole Arrow file ({reason})") from None
        self._checked: set[tuple[int, str]] = set()
        super().__init__(path, image_folder, schema.names, known, form, called)

    def group_rows(self) -> list[int]:
        """Rows of each record batch."""
        return [batch.num_rows for batch in self._batches]

    def group_sizes(self) -> list[str]:
        """Rows and bytes of each record batch."""
        return [f"{batch.num_rows} {batch.nbytes}" for batch in self._batches]

    def read_group(self, group: int, columns: Sequence[str]) -> Any:
        """Some columns of a record batch; each is checked before it is read first.

        Raises:
            DataError: Its offsets lead out of its data (pyarrow would read there, or crash).
        """
        batch = self._batches[group]
        for name in columns:
            if (group, name) in self._checked:
                continue
            try:
                batch.column(name).validate(full=True)
            except self._arrow.ArrowInvalid as error:
                reason = " ".join(str(error).split())[:120]
                where = f"'{self.path}': column '{name}' of record batch {group}"
                raise DataError(f"{where} is damaged ({reason}); copy or make it again") from None
            self._checked.add((group, name))
        return self._arrow.Table.from_batches([batch]).select(list(columns))

    def group_table(self, group: int, images: bool) -> Any:
        """A batch's text or its images; nothing is copied."""
        return self.read_group(group, self.image_columns() if images else self._text_columns)

    def line(self, offset: int) -> str:
        """Record batch."""
        return f"record batch {offset}"

    def close(self) -> None:
        """Unmaps the file."""
        self._batches = []
        self._map.close()


def saved_files(folder: Path, setting: str) -> list[str] | None:
    """The files of a folder that `datasets` saved; None where it is no such folder.

    Raises:
        DataError: It holds several splits, or its list of files is damaged.
    """
    if (folder / "dataset_dict.json").is_file():
        names = sorted(path.parent.name for path in folder.glob("*/state.json"))
        raise DataError(
            f"{setting}: '{folder}' holds the splits {', '.join(names)}; name the folder of one"
        )
    state = folder / "state.json"
    if not state.is_file():
        return None
    try:
        listed = json.loads(state.read_text("utf-8"))["_data_files"]
        return [str(folder / Path(one["filename"]).name) for one in listed]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{setting}: '{state}' lists no files of `datasets`") from None


def _batches(arrow: Any, ipc: Any, mapped: Any) -> tuple[list[Any], Any]:
    try:
        stream = ipc.open_stream(mapped)
    except arrow.ArrowInvalid:
        mapped.seek(0)
        file = ipc.open_file(mapped)
        return [file.get_batch(number) for number in range(file.num_record_batches)], file.schema
    batches = list(stream)
    mapped.seek(max(mapped.size() - len(_END_OF_STREAM), 0))
    if mapped.read() != _END_OF_STREAM:
        raise ValueError(f"its end mark is missing behind {len(batches)} record batches")
    return batches, stream.schema
