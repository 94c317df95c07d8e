"""`python -m dattn_mcore.data prepare-digits --output data/digits`: makes the embedded data set."""

from __future__ import annotations

import argparse
import sys

from dattn_mcore.data.digits import DigitsPlan, prepare_digits
from dattn_mcore.errors import DattnError


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m dattn_mcore.data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare-digits", help="write the embedded digits data set")
    prepare.add_argument("--output", default="data/digits", help="folder to make")
    prepare.add_argument("--seed", type=int, default=DigitsPlan.seed, help="of every choice")
    chosen = parser.parse_args(arguments)
    try:
        folder = prepare_digits(chosen.output, DigitsPlan(seed=chosen.seed))
    except DattnError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(f"digits data set: {folder}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
