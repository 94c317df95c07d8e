"""Compressed files: unpacked once into the index's folder, since samples are read at random.

gzip needs nothing; zstd needs pyarrow (the extra `parquet`). A file that has changed is unpacked
again, and its former copy removed unless another run reads it (`hold`). One that is cut or damaged
is refused with its name. Memory stays at some megabytes, and 5 % of what is free on the disk stay
free: a few kilobytes of gzip can hold gigabytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import importlib
import logging
import os
import shutil
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from dattn_mcore.data.sources.zstd_frames import whole_frames
from dattn_mcore.errors import ConfigError, DataError
from dattn_mcore.parallel.packages import import_problem

_LOG = logging.getLogger(__name__)
_ENDINGS = {".gz": "gzip", ".tgz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
_PART = 1 << 20
_KEPT = 0.05  # share of the free bytes that unpacking leaves


def inner_name(path: Path) -> str:
    """Name of a file without what says that it is compressed."""
    if path.suffix.lower() == ".tgz":
        return f"{path.stem}.tar"
    return path.stem if path.suffix.lower() in _ENDINGS else path.name


def unpacked(path: Path, folder: str) -> Path:
    """The file itself, or the unpacked copy of one that is compressed; made where it is absent.

    Args:
        path: The file.
        folder: Where copies are kept.

    Raises:
        DataError: It is cut or damaged, or the copy cannot be written or has no room.
        ConfigError: It is zstd, and pyarrow is not installed.
    """
    kind = _ENDINGS.get(path.suffix.lower())
    if kind is None:
        return path
    try:
        copies = Path(folder) / "unpacked" / _hashed(os.path.abspath(path))
        copy = copies / _stamp(path) / inner_name(path)  # ids of samples have its name
        if copy.exists():
            return copy
        copies.mkdir(parents=True, exist_ok=True)
        with open(copies / "lock", "w") as lock:
            with contextlib.suppress(OSError):  # where the file system has locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            copy = copies / _stamp(path) / inner_name(path)  # it may have changed while we waited
            if not copy.exists():
                copy.parent.mkdir(exist_ok=True)
                _unpack(path, copy, kind, folder)
                _remove_others(copies, copy.parent)
    except OSError as error:
        raise DataError(
            f"'{path}' cannot be unpacked into '{folder}' ({error.strerror or error}); set "
            "data.index_dir to a folder that can be written and has room"
        ) from None
    return copy


def hold(handle: int) -> None:
    """Keeps an unpacked copy from being removed as long as it is open.

    Args:
        handle: Of the open copy.
    """
    with contextlib.suppress(OSError):  # where the file system has locks
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:12]


def _stamp(path: Path) -> str:
    """Of a file's content, as far as its size and time say."""
    status = path.stat()
    return _hashed(f"{status.st_size}\0{status.st_mtime_ns}")


def _remove_others(copies: Path, present: Path) -> None:
    """Removes former copies of a file; one that another run reads stays until the next change.

    A reader goes on with a copy that is open, but where the folder is another machine's.
    """
    for former in copies.iterdir():
        if former != present and former.is_dir() and not any(map(_is_read, former.iterdir())):
            _LOG.info("'%s', a former copy, is removed", former)
            shutil.rmtree(former, ignore_errors=True)


def _is_read(file: Path) -> bool:
    """Whether anybody may read a copy: also where the file system has no locks to say so."""
    try:
        with open(file, "rb") as copy:
            fcntl.flock(copy, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError:
        return True


def _unpack(path: Path, copy: Path, kind: str, folder: str) -> None:
    _LOG.info("'%s' is unpacked into '%s'", path, copy.parent)
    temporary = copy.with_name(f"{copy.name}.{os.getpid()}")
    try:
        _write(path, temporary, kind, folder)
        if _stamp(path) != copy.parent.name:
            raise DataError(
                f"'{path}' has changed while it was unpacked; start again when it is whole"
            )
        os.replace(temporary, copy)
    finally:
        temporary.unlink(missing_ok=True)


def _write(path: Path, out_path: Path, kind: str, folder: str) -> None:
    free = _free(out_path.parent)
    kept = int(free * _KEPT)
    written = path.stat().st_size  # before anything is: at least so much will be needed
    if written > free - kept:
        raise _no_room(path, folder, written, free)
    written = 0
    with open(out_path, "wb") as out, open(path, "rb") as packed:
        stream = gzip.GzipFile(fileobj=packed) if kind == "gzip" else _zstd(path, packed)
        try:
            while part := stream.read(_PART):
                written += len(part)
                # Also what others write: the disk is theirs, too.
                if written > free - kept or _free(out_path.parent) - len(part) < kept:
                    raise _no_room(path, folder, written, free)
                out.write(part)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise _damaged(path, kind, error) from None
        except OSError as error:
            if error.errno:  # the disk's
                raise
            raise _damaged(path, kind, error) from None
        finally:
            stream.close()


def _free(folder: Path) -> int:
    """Bytes that this user may write to a folder's disk."""
    return shutil.disk_usage(folder).free


def _no_room(path: Path, folder: str, needed: int, free: int) -> DataError:
    return DataError(
        f"'{path}' takes {needed:,} bytes or more unpacked, and '{folder}' had {free:,} free, of "
        "which 5 % stay free; set data.index_dir to a folder with more room"
    )


def _zstd(path: Path, packed: BinaryIO) -> Any:
    if problem := import_problem("pyarrow"):
        raise ConfigError(
            f"'{path}' is compressed with zstd, and pyarrow {problem}; install the extra 'parquet'"
        )
    if fault := whole_frames(packed):
        raise _damaged(path, "zstd", fault)
    arrow: Any = importlib.import_module("pyarrow")
    return arrow.CompressedInputStream(arrow.PythonFile(packed, mode="r"), "zstd")


def _damaged(path: Path, kind: str, error: Exception | str) -> DataError:
    reason = " ".join(str(error).split())[:120]
    return DataError(f"'{path}' is no whole {kind} file ({reason}); copy or make it again")
