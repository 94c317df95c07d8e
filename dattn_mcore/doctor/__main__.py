"""`python -m dattn_mcore.doctor`: what is installed, what a run takes and why, what is missing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from dattn_mcore.doctor.examine import examine
from dattn_mcore.errors import DattnError, error_lines
from dattn_mcore.training.main import add_settings, read_settings

PROGRAM = "python -m dattn_mcore.doctor"


def main(arguments: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Runs the command.

    Returns:
        0 where a run would start; 1 where something that it needs is missing or broken, each with a
        line on standard error; 2 for a mistake in its settings.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description="What is installed on this machine, what a run with these settings would take "
        "and why, and what is missing. Takes the trainer's arguments; nothing is changed.",
    )
    add_settings(parser)
    parser.add_argument("--json", action="store_true", help="print JSON, for a bug report")
    try:
        config, chosen = read_settings(parser, arguments)
    except DattnError as error:
        sys.stderr.write(error_lines(error))
        return 2
    report = examine(config, chosen.config or "the embedded digits task")
    sys.stdout.write(report.as_json() if chosen.json else report.as_text())
    sys.stdout.flush()  # before what stands on standard error, in a log of both
    sys.stderr.write(report.problem_lines())
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
