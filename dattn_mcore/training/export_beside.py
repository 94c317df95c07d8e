"""A Hugging Face folder of each checkpoint that stays, made in a process beside training.

The converter's own command does the work, with its check at the end, one checkpoint at a time, the
newest first. What is to be done follows from the folders alone: a whole checkpoint without an
export is exported. So an export that was killed is done again when the run goes on.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch.distributed as dist

import dattn_mcore
from dattn_mcore.checkpoint.folders import EXPORTS, export_of, list_checkpoints, whole_manifest
from dattn_mcore.parallel import gpus
from dattn_mcore.parallel.groups import wait_for_all
from dattn_mcore.training.hooks import Hook, StepDone
from dattn_mcore.training.launch import without_rank
from dattn_mcore.training.watchdog import Watchdog

logger = logging.getLogger(__name__)
PROGRAM = "tools.checkpoint_convert.beside_training"
END_SECONDS = 20.0  # to a process that was asked to end


@dataclass
class _Job:
    checkpoint: Path
    process: subprocess.Popen[bytes]
    errors: IO[bytes]


class ExportBeside(Hook):
    """Exports checkpoints on rank 0; every rank has one, and waits for the last export at the end.

    Args:
        run_dir: with `checkpoints`; exports go into `exports` beside it.
        watchdog: learns that waiting has no limit.
    """

    everywhere = True

    def __init__(self, run_dir: Path, watchdog: Watchdog) -> None:
        self._root, self._exports = run_dir / "checkpoints", run_dir / EXPORTS
        self._watchdog = watchdog
        self._works = dist.get_rank() == 0
        self._job: _Job | None = None
        self._failed: set[str] = set()
        self._seen = -1  # when the folder of checkpoints was changed last
        if self._works:
            for left in self._exports.glob(".step_*.tmp"):  # of a conversion that was killed
                shutil.rmtree(left, ignore_errors=True)

    def after_step(self, done: StepDone) -> None:
        """Looks after the process, which costs a system call or two."""
        if self._works:
            self._go_on()

    def saved(self, folder: Path) -> None:
        """Begins the export of what was saved."""
        if self._works:
            self._go_on()

    def in_use(self) -> set[Path]:
        """The checkpoint that is being exported: with `keep: 1` none would ever come to its end."""
        return set() if self._job is None else {self._job.checkpoint}

    def close(self, step: int, complete: bool) -> None:
        """Waits for the exports of a complete run; a stopped one does them when it goes on."""
        self._watchdog.phase("exporting checkpoints", 0, "")
        try:
            if self._works and complete:
                self._go_on()
                while self._job is not None:
                    self._job.process.wait()
                    self._go_on()
            elif self._works:
                self._stop()
        finally:
            wait_for_all(EXPORTS)

    def _go_on(self) -> None:
        """Takes note of a process that has ended, and starts the next one."""
        if self._job is not None:
            if self._job.process.poll() is None:
                return
            self._note(self._job)
            self._job, self._seen = None, -1
        try:
            changed = self._root.stat().st_mtime_ns
        except OSError:
            return  # nothing was saved yet, or the folder is gone
        if changed == self._seen:
            return
        self._seen = changed
        for checkpoint in list_checkpoints(self._root):
            if checkpoint.name in self._failed or os.path.lexists(export_of(checkpoint)):
                continue
            if not checkpoint.is_symlink() and whole_manifest(checkpoint) is not None:
                self._job = self._start(checkpoint)
                return

    def _start(self, checkpoint: Path) -> _Job | None:
        arguments = [str(os.getpid()), str(checkpoint), str(export_of(checkpoint))]
        errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed when the process has ended)
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", PROGRAM, *arguments],
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )
        except OSError as error:
            errors.close()
            self._fail(checkpoint, str(error))
            return None
        return _Job(checkpoint, process, errors)

    def _note(self, job: _Job) -> None:
        """Says what came of an export; one whose checkpoint is gone goes as well."""
        job.errors.seek(0)
        lines = [line for line in job.errors.read().decode(errors="replace").splitlines() if line]
        job.errors.close()
        export = export_of(job.checkpoint)
        if not job.checkpoint.is_dir():
            shutil.rmtree(export, ignore_errors=True)
        elif job.process.returncode == 0:
            logger.info("exported %s", export)
        else:
            last = lines[-1].removeprefix("error: ") if lines else "no message"
            self._fail(job.checkpoint, f"{last} (status {job.process.returncode})")

    def _fail(self, checkpoint: Path, reason: str) -> None:
        self._failed.add(checkpoint.name)
        logger.warning(
            "warning: %s was not exported: %s; training goes on, and the next start tries again",
            checkpoint,
            reason,
        )

    def _stop(self) -> None:
        if self._job is None:
            return
        self._job.process.terminate()  # it removes what it has written
        try:
            self._job.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._job.process.kill()
            self._job.process.wait()
        self._job.errors.close()
        self._job = None


def _environment() -> dict[str, str]:
    """Of a process that is no rank, needs no GPU, and finds this installation of the converter."""
    root = str(Path(dattn_mcore.__file__).parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**without_rank(os.environ), **gpus.without_gpus(), "PYTHONPATH": path}
