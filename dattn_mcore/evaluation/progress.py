"""Progress of a run: bars on a terminal, now and then a line in a log; both with rate and ETA."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from dattn_mcore.console import complain

LINE_SECONDS = 30.0


class Rate(ProgressColumn):
    """Questions per second."""

    def render(self, task: Task) -> Text:
        """See rich."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} questions/s")


def bars(console: Console) -> Progress:
    """Bars with count, rate and ETA."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
        console=console,
    )


class RunProgress:
    """What is answered of each benchmark; silent but on rank 0.

    Args:
        shown: whether this process shows anything.
    """

    def __init__(self, shown: bool) -> None:
        console = Console(stderr=True)
        self.shown = shown
        self.bars = bars(console) if shown and console.is_terminal else None
        self.tasks: dict[str, int] = {}
        self.begun: dict[str, tuple[float, int]] = {}
        self.reported = 0.0

    def begin(self, name: str, done: int, total: int) -> None:
        """A benchmark starts, of which some rows were answered before."""
        self.begun[name] = (time.monotonic(), done)
        self.reported = time.monotonic()
        if self.bars is not None:
            task = self.bars.add_task(name, total=total, completed=done)
            self.tasks[name] = task
        elif self.shown:
            complain(f"{name}: {total} questions, {done} answered before")

    def update(self, name: str, done: int, total: int, note: str = "") -> None:
        """So many of all rows are answered; a note says what else is to be known."""
        if self.bars is not None:
            task: Any = self.tasks[name]
            self.bars.update(task, completed=done, description=f"{name} ({note})" if note else name)
            return
        now = time.monotonic()
        if self.shown and (now - self.reported >= LINE_SECONDS or done >= total):
            start, before = self.begun[name]
            rate = (done - before) / max(now - start, 1e-9)
            left = f"{(total - done) / rate:.0f} s" if rate else "unknown"
            more = f", {note}" if note else ""
            complain(f"{name}: {done}/{total}, {rate:.1f} questions/s, ETA {left}{more}")
            self.reported = now

    def __enter__(self) -> RunProgress:
        if self.bars is not None:
            self.bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bars is not None:
            self.bars.stop()
