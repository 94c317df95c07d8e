"""Checks SHA-256 of files right behind their reading, so that a disk reads each file once."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dattn_mcore.errors import CheckpointError

BLOCK = 1 << 22  # bytes hashed at a time


class FollowingDigest:
    """One thread that hashes files up to where somebody else has read them."""

    def __init__(self, folder: Path, files: Mapping[str, tuple[int, str]]) -> None:
        """Opens nothing yet.

        Args:
            folder: where the files lie.
            files: size and SHA-256 that each must have.
        """
        self._folder, self._files = folder, files
        self._hashes: dict[str, Any] = {name: hashlib.sha256() for name in files}
        self._at = dict.fromkeys(files, 0)
        self._block = memoryview(bytearray(BLOCK))  # one for all: new memory costs page faults
        self._stop = threading.Event()
        self._thread = ThreadPoolExecutor(1)
        self._jobs: list[Future[None]] = []

    def follow(self, name: str, position: int) -> None:
        """The file has been read up to this byte; files that are not checked here are ignored."""
        if name in self._files:
            self._jobs.append(self._thread.submit(self._advance, name, position))

    def finish(self) -> None:
        """Hashes what nobody read, and compares.

        Raises:
            CheckpointError: a file was altered, or cannot be read.
        """
        for name, (size, _) in self._files.items():
            self.follow(name, size)
        for job in self._jobs:
            job.result()
        for name, (_, sha256) in self._files.items():
            if self._hashes[name].hexdigest() != sha256:
                raise CheckpointError(
                    f"{self._folder}: {name} was altered (SHA-256 differs); use an earlier "
                    "checkpoint"
                )

    def __enter__(self) -> FollowingDigest:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.shutdown(cancel_futures=True)

    def _advance(self, name: str, position: int) -> None:
        try:
            with (self._folder / name).open("rb", buffering=0) as file:
                file.seek(self._at[name])
                while (missing := position - self._at[name]) > 0 and not self._stop.is_set():
                    count = file.readinto(self._block[:missing])
                    if not count:
                        return  # shorter than it was: the digest will differ
                    self._hashes[name].update(self._block[:count])
                    self._at[name] += count
        except OSError as error:
            raise CheckpointError(
                f"{self._folder / name} cannot be read ({error.strerror}); use an earlier "
                "checkpoint"
            ) from None
