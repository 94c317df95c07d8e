"""A folder of a data set that is made once, whole or not at all."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dattn_mcore.errors import DataError

_LOG = logging.getLogger(__name__)


def prepare_folder(
    output: Path, what: str, made_of: dict[str, Any], write: Callable[[Path], None]
) -> Path:
    """Writes a data set, unless it is there already.

    It is written to a temporary folder beside `output` and renamed when whole, so that a killed
    run leaves nothing half-made and processes that race do no harm.

    Args:
        output: folder to make.
        what: name of the data set, for messages.
        made_of: version and sizes; a folder made of the same is kept, another one replaced.
        write: makes the folder it is given, with everything in it.

    Returns:
        The folder.

    Raises:
        DataError: the folder exists and holds something else, or cannot be written.
    """
    if _is_prepared(output, made_of):
        return output
    foreign = output.exists() and not (output / "prepared.json").exists()
    if foreign and not (output.is_dir() and not any(output.iterdir())):
        raise DataError(
            f"'{output}' exists and holds something else than the {what} data set; give another "
            "folder"
        )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=output.parent, prefix=f".{output.name}.", ignore_cleanup_errors=True
        ) as scratch:
            made = Path(scratch) / "made"
            write(made)
            (made / "prepared.json").write_text(json.dumps(made_of) + "\n", encoding="utf-8")
            _move_into_place(made, output, Path(scratch) / "old", made_of)
    except OSError as error:
        raise DataError(f"'{output}' cannot be written ({error.strerror or error})") from error
    _LOG.info("prepared the %s data set in '%s'", what, output)
    return output


def _is_prepared(output: Path, made_of: dict[str, Any]) -> bool:
    try:
        return bool(json.loads((output / "prepared.json").read_text("utf-8")) == made_of)
    except (OSError, ValueError):
        return False


def _move_into_place(made: Path, output: Path, old: Path, made_of: dict[str, Any]) -> None:
    """Renames the finished folder; an older one goes first, an equal one of a rival stays."""
    if _is_prepared(output, made_of):
        return
    try:
        if output.exists():
            output.rename(old)
        made.rename(output)
    except OSError:
        if not _is_prepared(output, made_of):
            raise
