"""Walks over the members of a tar file and refuses one that is cut or damaged.

`tarfile` ends its walk in silence at a header that is damaged or cut, as if the shard ended there.
A whole shard ends with blocks of zeros and nothing behind them. Python, GNU tar and libarchive
write at least two; one is taken as well, for no header can follow it. A file that ends where a
member ends, without zeros, is refused: so looks a download that stopped there, and a shard whose
writer was killed.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dattn_mcore.errors import DataError

_BLOCK = 512
_AGAIN = "copy or make the shard again"


class _OpenFile(io.RawIOBase):
    """An open file from its beginning: it may have no name any more, and others may read it."""

    def __init__(self, handle: int) -> None:
        super().__init__()
        self._handle, self._place = handle, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = os.pread(self._handle, len(buffer), self._place)
        buffer[: len(found)] = found
        self._place += len(found)
        return len(found)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place}.get(whence)
        self._place = (os.fstat(self._handle).st_size if start is None else start) + offset
        return self._place

    def tell(self) -> int:
        return self._place


def tar_members(path: Path, handle: int) -> Iterator[tarfile.TarInfo]:
    """Yields the members but folders, one at a time; a link is a member. Reads headers only.

    Args:
        path: How messages call the file.
        handle: Of the open file; its own position is not used.

    Raises:
        DataError: The file cannot be read, is no tar file, or is cut or damaged (at which byte).
    """
    try:
        with io.BufferedReader(_OpenFile(handle)) as file:
            yield from _walk(path, file)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise DataError(f"'{path}' is no whole tar file ({error})") from None
    except OSError as error:  # too many open files, a failing disk: nothing wrong with the shard
        raise DataError(f"'{path}' cannot be read ({error.strerror})") from None


def members_at(path: Path, handle: int, offset: int, length: int) -> Iterator[tarfile.TarInfo]:
    """Yields the members of a stretch of a shard, which begins at a member's header.

    Args:
        path: How messages call the file.
        handle: Of the open file; its own position is not used.
        offset: First byte of the stretch.
        length: Bytes of it.

    Raises:
        DataError: The file cannot be read, or no header stands there any more.
    """
    try:
        with io.BufferedReader(_OpenFile(handle)) as file:
            file.seek(offset)
            with tarfile.open(fileobj=file, mode="r:") as shard:
                while shard.offset < offset + length and (member := shard.next()) is not None:
                    shard.members = []  # type: ignore[attr-defined]
                    if member.isreg():
                        yield member
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise DataError(f"'{path}' is no whole tar file ({error})") from None
    except OSError as error:
        raise DataError(f"'{path}' cannot be read ({error.strerror})") from None


def _walk(path: Path, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    size = file.seek(0, 2)
    file.seek(0)
    # Not the mode "r|": it reads every byte. tarfile keeps all members: they are dropped.
    with tarfile.open(fileobj=file, mode="r:") as shard:
        while (member := shard.next()) is not None:
            shard.members = []  # type: ignore[attr-defined]
            if member.isdir():
                continue
            # A damaged size can be negative, too. A sparse file's is larger than what is stored.
            stored = member.isreg() and not member.issparse()
            if stored and not 0 <= member.size <= size - member.offset_data:
                raise DataError(
                    f"'{path}' is truncated inside its member '{member.name}', which starts at "
                    f"byte {member.offset_data}; {_AGAIN}"
                )
            yield member
        _check_end(path, file, shard.offset)


def _check_end(path: Path, file: BinaryIO, end: int) -> None:
    """Refuses a shard with anything but zeros from where its last member ends."""
    file.seek(end)
    block = file.read(_BLOCK)
    if len(block) < _BLOCK:
        where = "inside a member's header" if block.strip(b"\0") else "before the zeros that end it"
        raise DataError(f"'{path}' is truncated at byte {end + len(block)}, {where}; {_AGAIN}")
    if block.strip(b"\0"):
        raise DataError(
            f"'{path}' is damaged at byte {end}: no member's header stands there; {_AGAIN}"
        )
    while block := file.read(1 << 20):
        if block.strip(b"\0"):
            raise DataError(
                f"'{path}' is damaged at byte {end}: zeros stand there as at a tar's end, but "
                f"data follow; {_AGAIN}"
            )
