"""Makes an index: in parallel, in parts that a killed build goes on from, renamed when whole."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np

from dattn_mcore.data.index.join import join_parts
from dattn_mcore.data.index.layout import IndexSettings
from dattn_mcore.data.index.rows import RowMaker
from dattn_mcore.data.sources.place import Place
from dattn_mcore.data.sources.source import open_source_file
from dattn_mcore.data.tokenizer import Tokenizer
from dattn_mcore.errors import KINDS, DataError, DattnError, kind_of
from dattn_mcore.units import duration, rate

_LOG = logging.getLogger(__name__)
PART = 2048  # records
_SECONDS_BETWEEN_LINES = 5.0
_maker: RowMaker | None = None  # of a worker process


def build_index(
    folder: Path, settings: IndexSettings, tokenizer: Tokenizer | None = None, workers: int = 0
) -> None:
    """Writes an index, or finishes one that was begun.

    Args:
        folder: Where it goes; what stands there is replaced when the new one is whole.
        settings: What it is made from.
        tokenizer: Opened already, or None.
        workers: Processes; 0 works in this one.

    Raises:
        DataError: A source that is no whole file of its format, or a folder that cannot be written.
    """
    begun = folder.with_name(folder.name + ".partial")
    try:
        files = [describe_file(settings, number) for number in range(len(settings.files))]
        made_from = {"settings": settings.as_json(), "files": files, "part": PART}
        _begin(begun, made_from)
        if settings.hash_images:
            _LOG.info("index  data.hash_images=true: every image is read whole, once")
        counts = _make_parts(begun, settings, tokenizer, workers)
        join_parts(begun, settings, counts, made_from)
        _replace(begun, folder)
    except OSError as error:
        raise DataError(
            f"index '{folder}' cannot be written ({error.strerror or error}); "
            "set data.index_dir to a folder that can"
        ) from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lets one process after the other work on an index, where the file system has locks."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder.with_name(folder.name + ".lock"), os.O_CREAT | os.O_RDWR, 0o666)
    except OSError as error:
        raise DataError(
            f"index '{folder}' cannot be written ({error.strerror}); "
            "set data.index_dir to a folder that can"
        ) from None
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def describe_file(settings: IndexSettings, number: int) -> dict[str, Any]:
    """Size, time and digest of a source file."""
    within, source = settings.files[number]
    path = source.files[within]
    status = path.stat()
    opened = open_source_file(source, within)
    try:
        content = opened.digest()
    finally:
        opened.close()
    return {
        **{"path": str(path), "size": status.st_size, "time": status.st_mtime_ns},
        **{"digest": content},
    }


def _begin(begun: Path, made_from: dict[str, Any]) -> None:
    """Makes the folder of parts; parts made from something else go."""
    marker = begun / "plan.json"
    try:
        same = json.loads(marker.read_text("utf-8")) == made_from
    except (OSError, ValueError):
        same = False
    if not same:
        shutil.rmtree(begun, ignore_errors=True)
        begun.mkdir(parents=True)
        marker.write_text(json.dumps(made_from), encoding="utf-8")


def _jobs(settings: IndexSettings) -> Iterator[tuple[int, list[Place], float]]:
    """(file, places, share of all files that is behind) for every part, in order."""
    sizes = [source.files[number].stat().st_size for number, source in settings.files]
    whole, behind = max(sum(sizes), 1), 0
    for file, (number, source) in enumerate(settings.files):
        opened = open_source_file(source, number)
        places: list[Place] = []
        try:
            for place in opened.scan():
                places.append(place)
                if len(places) == PART:
                    yield file, places, (behind + opened.share(place) * sizes[file]) / whole
                    places = []
        finally:
            opened.close()
        behind += sizes[file]
        if places:
            yield file, places, behind / whole


def _make_parts(
    begun: Path, settings: IndexSettings, tokenizer: Tokenizer | None, workers: int
) -> list[Path]:
    """Makes the parts that are missing; returns all in order."""
    progress = _Progress()
    paths: list[Path] = []
    with contextlib.ExitStack() as stack:
        pool: ProcessPoolExecutor | None = None
        maker = None
        running: dict[Future[int], float] = {}  # to the share that is behind each
        if workers > 0:
            # Not forked: a parent may have threads.
            context = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(workers, context, _start_worker, (settings,))
            stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        for number, (file, places, share) in enumerate(_jobs(settings)):
            paths.append(begun / f"part-{number:06d}.npz")
            if paths[-1].exists():
                progress.found(len(places), share)
            elif pool is None:
                maker = maker or RowMaker(settings, tokenizer)
                progress.made(_write_part(maker, paths[-1], file, places), share)
            else:
                running[pool.submit(_work, paths[-1], file, places)] = share
                if len(running) > 2 * workers:
                    _collect(running, progress)
        while running:
            _collect(running, progress)
    if not paths:
        raise DataError(
            f"data: '{settings.sources[0].files[0]}' holds no records; "
            "name a file that holds samples"
        )
    progress.close()
    return paths


def _collect(running: dict[Future[int], float], progress: _Progress) -> None:
    """Counts the parts that are done; waits for one."""
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        progress.made(future.result(), running.pop(future))


def _start_worker(settings: IndexSettings) -> None:
    global _maker
    _maker = RowMaker(settings)


def _work(path: Path, file: int, places: list[Place]) -> int:
    assert _maker is not None
    try:
        return _write_part(_maker, path, file, places)
    except DattnError as error:
        raise KINDS[kind_of(error)](str(error)) from None


def _write_part(maker: RowMaker, path: Path, file: int, places: list[Place]) -> int:
    """Writes one part, whole or not at all."""
    part = maker.rows_of(file, places)
    temporary = path.with_suffix(".tmp")
    arrays: dict[str, Any] = part.arrays()
    for name, value in (("bad", part.bad), ("ignored", part.ignored)):
        arrays[name] = np.frombuffer(json.dumps(value).encode(), np.uint8)
    with open(temporary, "wb") as out:
        np.savez(out, **arrays)
    os.replace(temporary, path)
    return len(places)


def _replace(begun: Path, folder: Path) -> None:
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(begun, folder)
    shutil.rmtree(old, ignore_errors=True)


class _Progress:
    """Says every few seconds how far an index is."""

    def __init__(self) -> None:
        self._started = self._said = time.monotonic()
        self._made = self._found = 0
        self._share = self._share_found = 0.0

    def found(self, count: int, share: float) -> None:
        """Counts records whose part was there already."""
        self._found += count
        self._share = self._share_found = share

    def made(self, count: int, share: float) -> None:
        """Counts records that were worked on; says so now and then."""
        self._made += count
        self._share = max(self._share, share)  # parts end in any order
        now = time.monotonic()
        if now - self._said < _SECONDS_BETWEEN_LINES:
            return
        self._said = now
        seconds = now - self._started
        fresh = self._share - self._share_found
        left = f"  ETA {duration(seconds * (1 - self._share) / fresh)}" if fresh > 0 else ""
        _LOG.info(
            "index  %s samples  %.0f%%  %s samples/s%s",
            f"{self._made + self._found:,}",
            100 * self._share,
            rate(self._made / seconds),
            left,
        )

    def close(self) -> None:
        """Says how long it took, if it took long."""
        seconds = time.monotonic() - self._started
        if seconds >= _SECONDS_BETWEEN_LINES:
            _LOG.info("index  %s samples in %s", f"{self._made + self._found:,}", duration(seconds))
