"""Where the package's messages go when a command of it runs: plain lines on standard output."""

from __future__ import annotations

import logging
import sys

_NAME = "dattn_mcore"  # of the logger, and of the handler that is this file's


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
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False
