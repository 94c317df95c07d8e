"""Wall time, processor time and peak anonymous memory of a command, against copying its input."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import ROOT


@dataclass
class Measured:
    """One row of the table.

    Attributes:
        seconds: wall time, imports included.
        anonymous: peak anonymous resident memory of the largest process, bytes; None for a copy.
        nbytes: bytes read.
        processor_seconds: user and system time, of all processes.
        load: load average of the machine over a minute, before and after.
    """

    what: str
    nbytes: int
    seconds: float
    processor_seconds: float
    load: tuple[float, float]
    anonymous: int | None = None

    def cells(self) -> tuple[str, ...]:
        """Of a table: what, GB, seconds, GB/s, processor's seconds, GiB, load before and after."""
        return (
            self.what,
            f"{self.nbytes / 1e9:.2f}",
            f"{self.seconds:.1f}",
            f"{self.nbytes / self.seconds / 1e9:.2f}",
            f"{self.processor_seconds:.1f}",
            "" if self.anonymous is None else f"{self.anonymous / 2**30:.2f}",
            f"{self.load[0]:.1f}, {self.load[1]:.1f}",
        )

    def line(self) -> str:
        """The same in words, for a terminal."""
        speed = self.nbytes / self.seconds / 1e9
        return f"{self.what}: {self.nbytes / 1e9:.2f} GB in {self.seconds:.1f} s, {speed:.2f} GB/s"


def median(rows: list[Measured], field: str) -> float:
    """Of one of their numbers."""
    return statistics.median(getattr(row, field) for row in rows)


def _files(folders: list[Path]) -> list[Path]:
    return sorted(file for folder in folders for file in folder.rglob("*") if file.is_file())


def _forget(files: list[Path]) -> None:
    """Takes files out of the page cache."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _processor_seconds() -> float:
    """Of this process and all that it has waited for, theirs included."""
    return sum(os.times()[:4])


def measure_copy(title: str, folders: list[Path], target: Path) -> Measured:
    """Copies all files of folders into a new one, to the disk, and removes the copy.

    Args:
        title: of what the same files are the input.
        folders: read from the disk, not from the page cache.
        target: does not exist.
    """
    files = _files(folders)
    _forget(files)
    target.mkdir()
    before, started, processor = os.getloadavg()[0], time.monotonic(), _processor_seconds()
    for number, file in enumerate(files):
        copy = target / str(number)
        shutil.copyfile(file, copy)
        with copy.open("rb") as opened:
            os.fsync(opened.fileno())
    seconds = time.monotonic() - started
    processor = _processor_seconds() - processor
    load = (before, os.getloadavg()[0])
    shutil.rmtree(target)
    return Measured(f"copy of the input of {title}", _size(files), seconds, processor, load)


def measure_command(title: str, folders: list[Path], command: list[Any]) -> Measured:
    """Runs a Python module.

    Args:
        title: names it.
        folders: its input, which it has to read from the disk, not from the page cache.
        command: module and arguments.

    Raises:
        SystemExit: it ended with another status than 0 or 1, or printed nothing.
    """
    files = _files(folders)
    _forget(files)
    before, started, processor = os.getloadavg()[0], time.monotonic(), _processor_seconds()
    peak = _peak_of(command)
    seconds = time.monotonic() - started
    processor = _processor_seconds() - processor
    load = (before, os.getloadavg()[0])
    return Measured(title, _size(files), seconds, processor, load, peak)


def _size(files: list[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _peak_of(arguments: list[Any]) -> int:
    """Runs a Python module; the peak anonymous memory of the largest of its processes."""
    command = [sys.executable, "-m", *map(str, arguments)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    peak = _watch(process.pid, process.poll)
    out, error = process.communicate()
    if process.returncode not in (0, 1) or not out:
        raise SystemExit(f"{' '.join(command)} failed:\n{error}")
    return peak


def _watch(pid: int, finished: Callable[[], Any], interval_seconds: float = 0.02) -> int:
    """The largest RssAnon of a process or one that it forked, in bytes, sampled until it ends."""
    peak = 0
    while finished() is None:
        for process in (pid, *_children(pid)):
            peak = max(peak, _anonymous(process))
        time.sleep(interval_seconds)
    return peak


def _children(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    except OSError:  # it has just ended
        return []
    return [int(word) for word in text.split()]


def _anonymous(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:  # it has just ended
        return 0
    lines = [line for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(lines[0].split()[1]) * 1024 if lines else 0
