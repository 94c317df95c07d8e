"""Text for a terminal or a log: what comes from data, file names or servers is made printable.

A file's name may hold a line end and a forged "error: ...", or characters that clear a screen. No
message may pass those on: every string that the project did not write itself goes through
`printable`. Errors do so themselves (`errors.DattnError`), log lines by their formatter
(`log.LineFormatter`), lines on standard output and standard error by `say` and `complain`, cells of
tables by `cell`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text


def printable(text: object, keep: str = "") -> str:
    r"""A text on one line that a terminal shows and does nothing else with.

    Control characters, line ends, marks of writing direction and lone surrogates become escapes
    (`\n`, `\x1b`, `\u202e`); letters of all scripts stay. A text that was made printable stays.

    Args:
        text: Anything; its `str` is taken.
        keep: Characters that stay all the same.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in keep else _escaped(one) for one in text)


def say(text: object) -> None:
    """Writes a line to standard output."""
    sys.stdout.write(f"{printable(text)}\n")


def complain(text: object) -> None:
    """Writes a line to standard error."""
    sys.stderr.write(f"{printable(text)}\n")


def cell(text: object) -> Text:
    """A cell, title or line for rich, which reads `[red]` of a plain string as markup."""
    # Imported where it is used: commands without tables start faster.
    from rich.text import Text

    return Text(printable(text))


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
