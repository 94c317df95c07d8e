"""Runs items within a time, each in a process of its own with a hard limit; keeps what they said.

The folder of results holds, small and to be copied: results.json, summary.md, junit.xml (an item a
case), a log of each item (the end of what it wrote) and what the items write themselves. The first
three are written anew after each item, so that a check that is killed has said what it knew.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Literal
from xml.etree import ElementTree

from benchmarks.gpu_items import Item
from benchmarks.results import ROOT, markdown_table

Outcome = Literal["passed", "failed", "stopped", "no time"]
LOG_CHARACTERS = 20_000  # kept of each of an item's streams
SLACK = 2.5  # an item is stopped after so many times the expected minutes
END_SECONDS = 10.0  # for a process that was asked to end


@dataclass(frozen=True)
class Result:
    """What became of an item.

    Attributes:
        name: of the item.
        outcome: passed, failed; stopped at its limit; no time to start.
        seconds: that it ran.
        note: last line of its standard error, or why it did not run to its end.
        output: what it wrote to its standard output; not kept in results.json.
    """

    name: str
    outcome: Outcome
    seconds: float = 0.0
    note: str = ""
    output: str = ""


def run_item(item: Item, arguments: Sequence[str], limit_seconds: float, log: Path) -> Result:
    """Runs one item.

    Args:
        item: what runs.
        arguments: of Python.
        limit_seconds: then it is stopped, with all that it has started.
        log: file for the end of what it wrote.
    """
    started = time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as error:
        command = [sys.executable, *arguments]
        with process_group(command, out, error) as process:
            try:
                status: int | None = process.wait(max(limit_seconds, 0.0))
            except subprocess.TimeoutExpired:
                status = None
        output, said = _text(out), _text(error)
    seconds = time.monotonic() - started
    end = f"{output[-LOG_CHARACTERS:]}\n--- standard error\n{said[-LOG_CHARACTERS:]}"
    log.write_text(f"{' '.join(arguments)}\n\n{end}", encoding="utf-8")
    if status is None:
        return Result(
            item.name, "stopped", seconds, f"at its limit of {limit_seconds:.0f} s", output
        )
    if status == 0:
        return Result(item.name, "passed", seconds, output=output)
    last = (said.strip().splitlines() or output.strip().splitlines() or ["no message"])[-1]
    return Result(item.name, "failed", seconds, f"exit status {status}: {last}", output)


@contextlib.contextmanager
def process_group(
    command: Sequence[str], out: IO[bytes], error: IO[bytes]
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is ended, with all that it has started, when the block ends."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=out,
        stderr=error,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Asks the group to end, then ends it; what outlives the process itself, too."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", errors="replace")


def run_all(
    items: Sequence[Item],
    arguments_of: Callable[[Item], Sequence[str]],
    folder: Path,
    minutes: float | None,
    finished: Callable[[Item, Result], None],
) -> list[Result]:
    """Runs items one after the other.

    Args:
        items: in order of worth.
        arguments_of: Python's arguments of an item.
        folder: of the results.
        minutes: for all; an item whose expected time is not left does not start, and a shorter one
            after it can. None: all run.
        finished: called after each item.
    """
    results: list[Result] = []
    end = None if minutes is None else time.monotonic() + 60 * minutes
    folder.mkdir(parents=True, exist_ok=True)
    for item in items:
        left = None if end is None else end - time.monotonic()
        if left is not None and left < 60 * item.minutes:
            note = f"needs {item.minutes:g} min, {max(left, 0) / 60:.1f} left"
            result = Result(item.name, "no time", note=note)
        else:
            limit = 60 * item.minutes * SLACK
            limit = limit if left is None else min(limit, left)
            log = folder / f"{item.name}.log"
            result = run_item(item, arguments_of(item), limit, log)
        results.append(result)
        finished(item, result)
        write_results(results, folder)
    return results


def summary_table(results: Sequence[Result]) -> str:
    """Markdown: item, result, seconds, note."""
    return markdown_table(
        ("item", "result", "seconds", "note"),
        (
            (one.name, one.outcome, f"{one.seconds:.0f}", one.note.replace("|", "/")[:200])
            for one in results
        ),
    )


def write_results(results: Sequence[Result], folder: Path) -> None:
    """results.json, summary.md and junit.xml."""
    rows = [{**asdict(one), "output": None} for one in results]
    for row in rows:
        del row["output"]
    (folder / "results.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (folder / "summary.md").write_text(summary_table(results), encoding="utf-8")
    suite = ElementTree.Element("testsuite", name="gpu-check", tests=str(len(results)))
    for one in results:
        case = ElementTree.SubElement(suite, "testcase", name=one.name, time=f"{one.seconds:.1f}")
        if one.outcome == "no time":
            ElementTree.SubElement(case, "skipped", message=one.note)
        elif one.outcome != "passed":
            ElementTree.SubElement(case, "failure", message=f"{one.outcome}: {one.note}")
    ElementTree.ElementTree(suite).write(folder / "junit.xml", encoding="unicode")
