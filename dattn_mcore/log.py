"""Where messages go when a command runs: plain lines, one a message, of printable characters."""

from __future__ import annotations

import copy
import logging
import sys

from dattn_mcore.console import printable

_NAME = "dattn_mcore"  # of the logger, and of the handler that is this file's
_OURS = (_NAME, "tools")


class LineFormatter(logging.Formatter):
    """A message as `printable` makes it; those of other packages keep their line ends."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging."""
        ours = record.name.split(".")[0] in _OURS
        shown = copy.copy(record)
        shown.msg, shown.args = printable(record.getMessage(), keep="" if ours else "\n"), None
        return super().format(shown)


def log_to_stderr(level: int = logging.WARNING) -> None:
    """Sends messages of all packages to standard error, unless handlers are there already.

    Args:
        level: from which on messages are said.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("%(message)s"))
    logging.basicConfig(level=level, handlers=[handler])


def log_to_stdout(level: int = logging.INFO) -> None:
    """Sends messages of the package to standard output, and to nobody above.

    A second call puts the handler on what is standard output by then; handlers of others stay.

    Args:
        level: from which on messages are said.
    """
    logger = logging.getLogger(_NAME)
    for handler in list(logger.handlers):
        if handler.get_name() == _NAME:
            logger.removeHandler(handler)
    handler = logging.StreamHandler(sys.stdout)
    handler.set_name(_NAME)
    handler.setFormatter(LineFormatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
