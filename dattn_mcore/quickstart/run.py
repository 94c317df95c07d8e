"""Runs the steps one after the other and shows what they say."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from dattn_mcore.console import cell
from dattn_mcore.errors import DattnError
from dattn_mcore.quickstart.steps import ROOT, QuickstartRun, Step

_MARKER = "quickstart.json"  # only a folder that holds it is ever removed


class StepError(DattnError):
    """A step that ended with an error."""


def make_run_dir(folder: Path, made_by: Mapping[str, object]) -> None:
    """Makes the folder of this run; one of an earlier quickstart goes first.

    Raises:
        DattnError: it holds something that no quickstart made, or cannot be written.
    """
    try:
        if folder.exists() and not (folder / _MARKER).is_file() and any(folder.iterdir()):
            raise DattnError(f"{folder} is no folder of an earlier quickstart; name another")
        if folder.exists():
            shutil.rmtree(folder)
        (folder / "logs").mkdir(parents=True)
        (folder / _MARKER).write_text(json.dumps(made_by) + "\n", encoding="utf-8")
    except OSError as error:
        raise DattnError(f"{folder} cannot be written ({error.strerror})") from None


def run_steps(run: QuickstartRun, console: Console) -> dict[str, float]:
    """Runs all steps.

    Returns:
        Seconds of each step, by name.

    Raises:
        StepError: the first step that fails.
    """
    seconds = {}
    for number, step in enumerate(run.steps, start=1):
        console.print(f"\n[bold]{number}/{len(run.steps)}  {step.title}[/bold]")
        console.print(cell(f"   $ {step.typed}"), style="dim", highlight=False, soft_wrap=True)
        started = time.perf_counter()
        run_step(step, ROOT / run.run_dir / "logs", console)
        seconds[step.name] = time.perf_counter() - started
        console.print(f"   {seconds[step.name]:.0f} s", style="green", highlight=False)
    return seconds


def run_step(step: Step, logs: Path, console: Console, clone: Path = ROOT) -> None:
    """Runs one command; its output is shown, its warnings go to its log file.

    Args:
        step: the command.
        logs: folder of its log file.
        console: where its output is shown.
        clone: of the repository, whose code runs.

    Raises:
        StepError: it failed; the message holds its own last error line.
    """
    log = logs / f"{step.name}.log"
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONUNBUFFERED": "1"}
    with (
        open(log, "w", encoding="utf-8") as errors,
        subprocess.Popen(
            step.command,
            cwd=clone,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            errors="replace",
        ) as process,
    ):
        try:
            assert process.stdout is not None
            for line in process.stdout:
                console.print(cell(f"   {line.rstrip()}"), highlight=False, soft_wrap=True)
            status = process.wait()
        except BaseException:  # Ctrl-C above all: nothing may go on without its parent
            process.terminate()
            raise
    if status:
        raise StepError(
            f"step {step.name!r} failed with status {status}: {_last_error(log)}; "
            f"everything it said is in {log}"
        )


def _last_error(log: Path) -> str:
    lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines()]
    lines = [line for line in lines if line]
    errors = [line for line in lines if line.startswith("error: ")]
    if errors:
        return "; also: ".join(line.removeprefix("error: ") for line in errors)
    return (lines or ["it said nothing"])[-1]
