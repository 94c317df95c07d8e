"""What was found, and the two ways to write it: a table for people, JSON for bug reports."""

from __future__ import annotations

import dataclasses
import json
import socket
import textwrap
from dataclasses import dataclass, field
from typing import Any

from dattn_mcore import __version__
from dattn_mcore.console import printable

_WIDTH = 118  # characters of a line


@dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
        name: what it is about.
        value: what was found.
        note: why, or what it means; empty where there is nothing to say.
    """

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Problem:
    """Why a run would not start.

    Attributes:
        text: one line: what, why, and the way out.
        kind: error (a mistake that the user can fix) or fault (a machine that fails).
    """

    text: str
    kind: str = "error"


@dataclass
class Report:
    """Everything that was found on a machine.

    Attributes:
        subject: the configuration that it is about.
        host: name of the machine.
        sections: rows by the title of their table.
        missing: what could be installed, each with the command.
        problems: why a run would not start; empty: it would.
    """

    subject: str
    host: str = field(default_factory=socket.gethostname)
    sections: dict[str, list[Row]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def as_text(self) -> str:
        """The tables, ending with the verdict; problems stand in `problem_lines`."""
        lines = [f"dattn {__version__} on {self.host}: {self.subject}"]
        for title, rows in self.sections.items():
            lines += ["", title, *_table(rows)]
        if self.missing:
            lines += ["", "what is missing"]
            for text in self.missing:
                lines += _wrapped(f"  {text}", indent=4)
        lines += ["", self.verdict()]
        return "".join(f"{printable(line)}\n" for line in lines)

    def verdict(self) -> str:
        """Whether a run would start, in one line."""
        count = len(self.problems)
        if count == 0:
            return "a run would start"
        return f"a run would not start: {count} {'reason' if count == 1 else 'reasons'}"

    def problem_lines(self) -> str:
        """One line for each problem, as a run itself would say it."""
        return "".join(f"{one.kind}: {printable(one.text)}\n" for one in self.problems)

    def as_json(self) -> str:
        """The same for a program; holds no settings but the configuration's name."""
        found: dict[str, Any] = {"version": __version__, **dataclasses.asdict(self)}
        return json.dumps({**found, "would_start": not self.problems}, indent=1) + "\n"


def _table(rows: list[Row]) -> list[str]:
    names = max((len(row.name) for row in rows), default=0)
    values = min(max((len(row.value) for row in rows), default=0), 28)
    lines = []
    for row in rows:
        start = f"  {row.name:{names}}  {row.value:{values}}"
        text = f"{start}  {row.note}" if row.note else start.rstrip()
        lines += _wrapped(text, indent=names + values + 6)
    return lines


def _wrapped(text: str, indent: int) -> list[str]:
    """A text in lines; words that are longer than a line stay whole, as commands and paths must."""
    return textwrap.wrap(
        text,
        _WIDTH,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    )
