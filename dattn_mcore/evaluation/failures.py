"""What is reported of a benchmark that failed: a mistake in one line, a defect with a traceback."""

from __future__ import annotations

import traceback

from dattn_mcore.errors import DattnError
from dattn_mcore.evaluation.run_folder import RunFolder


def reason(error: Exception, folder: RunFolder, name: str, rank: int = 0) -> str:
    """Why a benchmark failed, in one line.

    A defect must not take the other benchmarks' hours with it: its traceback goes to a file.

    Args:
        error: what was raised.
        folder: of the run.
        name: of the benchmark.
        rank: of the process; each has a file of its own.
    """
    if isinstance(error, DattnError):
        return str(error)
    first = " ".join(str(error).split())[:200]
    summary = f"internal error: {type(error).__name__}: {first}"
    path = folder.path / f"errors-{rank}.log"
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{name}\n{''.join(traceback.format_exception(error))}\n")
    except OSError as problem:
        return f"{summary}; its traceback cannot be written to {path} ({problem.strerror})"
    return f"{summary}; see {path}"
