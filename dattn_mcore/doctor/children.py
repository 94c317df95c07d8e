"""Processes that import what may be broken, and say line by line how far they came.

A child writes JSON lines to what was its standard output; anything that an imported package prints
goes to standard error. It announces a step before it begins, so that a child that dies in one has
still said in which.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

SECONDS = 300.0  # for all of a child's steps; a package on a cold network file system is slow


@dataclass
class ChildReport:
    """What a child said.

    Attributes:
        steps: by name, what each finished step gave.
        died_in: the step in which it ended; None where it came to its end.
        how: in what way it ended there, and its last line.
    """

    steps: dict[str, Any] = field(default_factory=dict)
    died_in: str | None = None
    how: str = ""


class Child:
    """A child that has been started; several run side by side."""

    def __init__(self, module: str, arguments: Sequence[str] = (), given: str = "") -> None:
        """Starts `python -m MODULE ARGUMENT...`.

        Args:
            module: of this package.
            arguments: of its command line.
            given: what it reads from standard input.
        """
        self._given = given
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )

    def told(self) -> ChildReport:
        """Waits for its end."""
        try:
            out, err = self._process.communicate(self._given, timeout=SECONDS)
            how = _how(self._process.returncode)
        except subprocess.TimeoutExpired:
            self._process.kill()
            out, err = self._process.communicate()
            how = f"did not end within {SECONDS:g} seconds"
        told = ChildReport()
        begun: str | None = "starting"
        for line in out.splitlines():
            step = json.loads(line)
            begun = step["name"] if "gave" not in step else None
            if begun is None:
                told.steps[step["name"]] = step["gave"]
        if begun is not None or self._process.returncode:
            told.died_in = begun or "ending"
            last = (err.strip().splitlines() or [""])[-1]
            told.how = f"{how}: {last}" if last else how
        return told


def _how(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


def teller() -> Callable[[dict[str, Any]], None]:
    """In a child: what writes a line to the parent; takes standard output away from all others."""
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(line: dict[str, Any]) -> None:
        output.write(json.dumps(line) + "\n")
        output.flush()

    return tell
