"""Command line: `python -m dattn_mcore.quickstart [--run-dir DIR] [--cp N] [section.key=value]`."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from dattn_mcore.errors import DattnError, error_lines
from dattn_mcore.quickstart.expectation import ExpectationError, expectation
from dattn_mcore.quickstart.run import StepError, make_run_dir, run_steps
from dattn_mcore.quickstart.steps import DATA, ROOT, make_run

PROGRAM = "python -m dattn_mcore.quickstart"


def main(arguments: Sequence[str] | None = None, prog: str = PROGRAM) -> int:
    """Runs the command.

    Returns:
        0; 1 where a step failed or the accuracy is outside of what the settings must give; 2 for a
        user's mistake; 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Train a D-Attn model to read handwriting, convert it, and evaluate it.",
    )
    parser.add_argument(
        "--run-dir",
        type=Path,
        default=Path("runs/quickstart"),
        help="where everything goes; one of an earlier quickstart is replaced (%(default)s)",
    )
    parser.add_argument(
        "--data", type=Path, default=DATA, help="digits data set, made if absent (%(default)s)"
    )
    parser.add_argument(
        "--cp",
        type=int,
        default=None,
        metavar="N",
        help="context parallel ranks that divide each model's rows, beside the stages' own layouts",
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="setting for all three stages"
    )
    chosen = parser.parse_intermixed_args(arguments)
    console = Console(highlight=False)
    started = time.perf_counter()
    try:
        overrides = list(chosen.overrides)
        if chosen.cp is not None:
            overrides.append(f"parallel.cp={chosen.cp}")
        run = make_run(chosen.run_dir, chosen.data, overrides)
        expected = expectation(overrides)
        make_run_dir(ROOT / run.run_dir, {"overrides": overrides})
        seconds = run_steps(run, console)

        from dattn_mcore.quickstart.picture import draw
        from dattn_mcore.quickstart.summary import score, show

        result = score(run)
        draw(run, result)
        show(run, result, seconds, time.perf_counter() - started, console)
        expected.check(result.overall)
    except DattnError as error:
        sys.stdout.flush()
        sys.stderr.write(error_lines(error))
        return 1 if isinstance(error, StepError | ExpectationError) else 2
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
