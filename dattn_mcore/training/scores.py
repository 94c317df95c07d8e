"""Scores while training: whole checkpoints answer evaluation questions beside the run."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dattn_mcore.checkpoint.folders import SCORES, is_whole, list_checkpoints
from dattn_mcore.checkpoint.manifest import step_of
from dattn_mcore.config.schema import Config
from dattn_mcore.config.scores_rules import MOST_PENDING
from dattn_mcore.errors import DataError, DattnError
from dattn_mcore.parallel.groups import wait_for_all
from dattn_mcore.training.hooks import Hook, StepDone, cannot_report
from dattn_mcore.training.interval import IntervalReport
from dattn_mcore.training.last_words import unexpected
from dattn_mcore.training.launch import without_rank
from dattn_mcore.training.lines import read_lines
from dattn_mcore.training.score_checkpoint import (
    EXPORT,
    Scores,
    command,
    last_line,
    read_scores,
    write_request,
)
from dattn_mcore.training.sinks.json_lines import FILES
from dattn_mcore.training.sinks.sink import Row, Sink
from dattn_mcore.training.watchdog import Watchdog

logger = logging.getLogger(__name__)
LOG = "log.txt"
_POLL_SECONDS = 0.2
_SECONDS_BETWEEN_LINES = 30.0
_THREADS = "1"  # the cores are the run's


def is_due(config: Config, step: int, last_step: int) -> bool:
    """Whether the checkpoint of a step is scored: every `scores.interval` steps, and the last."""
    interval = config.scores.interval
    return step == last_step or (interval is not None and step % interval == 0)


@dataclass(frozen=True)
class _Process:
    """A checkpoint that is being scored."""

    checkpoint: Path
    folder: Path
    process: subprocess.Popen[bytes]

    @property
    def step(self) -> int:
        """Of the checkpoint."""
        return step_of(self.checkpoint) or 0


class ScoreCheckpoints(Hook):
    """Scores checkpoints one after the other, each in a process of its own; on rank 0.

    A process that fails ends nothing: its checkpoint has no scores, and a warning says why.

    Args:
        config: the run's.
        sinks: where rows go.
        first_step: step the run starts or resumes at; what is missing up to it is made good.
        last_step: steps after which the run is complete.
    """

    def __init__(self, config: Config, sinks: list[Sink], first_step: int, last_step: int) -> None:
        self._config, self._sinks, self._last_step = config, sinks, last_step
        self._run_dir = Path(config.log.run_dir)
        self._root = self._run_dir / SCORES
        self._waiting: deque[Path] = deque()
        self._running: _Process | None = None
        self._problem: DattnError | None = None
        self._clean(first_step)
        self._take_up(first_step)

    @property
    def num_pending(self) -> int:
        """Checkpoints that are being scored, or wait for it."""
        return len(self._waiting) + (self._running is not None)

    @property
    def problem(self) -> DattnError | None:
        """The error that ends the run: scores that cannot be written to its files."""
        return self._problem

    def after_step(self, done: StepDone) -> DattnError | None:
        """Looks whether scores are there, and starts what waits."""
        self._advance()
        return self._problem

    def saved(self, folder: Path) -> None:
        """Remembers a checkpoint whose turn it is."""
        if is_due(self._config, step_of(folder) or 0, self._last_step):
            self._waiting.append(folder)

    def in_use(self) -> set[Path]:
        """Checkpoints that are not scored yet."""
        waiting = set(self._waiting)
        return waiting if self._running is None else waiting | {self._running.checkpoint}

    def wait(self, most: int) -> None:
        """Waits until so many checkpoints at most are pending; says now and then how it goes."""
        self._advance()
        said = time.monotonic()
        while self.num_pending > most and self._problem is None:
            if time.monotonic() - said > _SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                logger.info("waiting for scores: %s", self._how_it_goes())
            time.sleep(_POLL_SECONDS)
            self._advance()

    def stop(self) -> None:
        """Ends a process that is under way; a resumed run starts it again."""
        if self._running is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._running.process.pid, signal.SIGKILL)
            self._running.process.wait()
            self._running = None
        self._waiting.clear()

    def _clean(self, first_step: int) -> None:
        """Removes half-written scores, and those of steps that will be done again."""
        for folder in self._root.glob("step_*"):
            step = step_of(folder)
            if step is not None and (step > first_step or read_scores(folder) is None):
                shutil.rmtree(folder)

    def _take_up(self, first_step: int) -> None:
        """Goes on where an earlier start was ended: rows first, then checkpoints without scores."""
        reported = {row["step"] for row in read_lines(self._run_dir / FILES["scores"])}
        for folder in sorted(self._root.glob("step_*")):
            scores = read_scores(folder)
            if scores is not None and scores.step not in reported:
                self._report(scores)
                reported.add(scores.step)
        for checkpoint in reversed(list_checkpoints(self._run_dir / "checkpoints")):
            step = step_of(checkpoint) or 0
            due = step <= first_step and is_due(self._config, step, self._last_step)
            if due and step not in reported and is_whole(checkpoint):
                self._waiting.append(checkpoint)

    def _advance(self) -> None:
        """Takes what is finished, and starts the next; what goes wrong is the run's next error."""
        try:
            if self._running is not None and self._running.process.poll() is not None:
                finished, self._running = self._running, None
                self._finish(finished)
            if self._running is None and self._waiting:
                self._running = self._start(self._waiting.popleft())
        except OSError as error:
            self._problem = self._problem or cannot_report(self._config, error)
        except Exception as error:  # noqa: BLE001 (a defect; the other ranks must know)
            found = unexpected(error, "reporting scores", self._run_dir)
            self._problem = self._problem or found

    def _start(self, checkpoint: Path) -> _Process | None:
        folder = self._root / checkpoint.name
        step = step_of(checkpoint) or 0
        try:
            if folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True)
            write_request(folder, step, checkpoint, self._config.scores)
            with open(folder / LOG, "wb") as log:
                process = subprocess.Popen(
                    command(folder),
                    env=environment(os.environ),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # a Ctrl-C is for the run, which saves before it ends
                )
        except (OSError, DataError) as error:
            self._warn(step, str(error), folder)
            return None
        return _Process(checkpoint, folder, process)

    def _finish(self, done: _Process) -> None:
        if not self._config.scores.keep_export or done.process.returncode:
            for left in (done.folder / EXPORT, *done.folder.glob(f".{EXPORT}.*.tmp")):
                shutil.rmtree(left, ignore_errors=True)
        scores = None if done.process.returncode else read_scores(done.folder)
        if scores is None:
            self._warn(done.step, _why(done), done.folder)
        else:
            self._report(scores)

    def _report(self, scores: Scores) -> None:
        """Passes on what a process left."""
        for name, problem in scores.problems.items():
            logger.warning("no score of %s at step %d: %s", name, scores.step, problem)
        for name, note in scores.notes.items():
            logger.warning("the score of %s at step %d: %s", name, scores.step, note)
        for sink in self._sinks:
            sink.write(Row("scores", scores.step, self._last_step, dict(scores.values)))
            if scores.examples:
                sink.show("scores", scores.step, scores.examples)

    def _warn(self, step: int, reason: str, folder: Path) -> None:
        logger.warning(
            "the checkpoint of step %d has no scores (%s); training goes on, and %s says more",
            step,
            reason,
            folder / LOG,
        )

    def _how_it_goes(self) -> str:
        if self._running is None:
            return f"{self.num_pending} checkpoints"
        more = f", {len(self._waiting)} more after it" if self._waiting else ""
        last = _last_line(self._running.folder / LOG)
        return f"step {self._running.step}{f' ({last})' if last else ''}{more}"


class WaitForScores(Hook):
    """Holds the ranks together while rank 0 waits for scores.

    Args:
        config: the run's.
        scoring: on rank 0; None elsewhere.
        watchdog: of this process.
        interval: whose rates leave the time out, on rank 0.
        last_step: steps after which the run is complete.
    """

    everywhere = True

    def __init__(
        self,
        config: Config,
        scoring: ScoreCheckpoints | None,
        watchdog: Watchdog,
        interval: IntervalReport | None,
        last_step: int,
    ) -> None:
        self._config, self._scoring, self._watchdog = config, scoring, watchdog
        self._interval, self._last_step = interval, last_step
        self._waits = 0  # the same on every rank; a step can be saved twice

    def saved(self, folder: Path) -> None:
        """Waits for this checkpoint's scores, or until older ones are not too far behind."""
        step = step_of(folder) or 0
        if not is_due(self._config, step, self._last_step):
            return
        started = time.perf_counter()
        self._wait(0 if self._config.scores.wait else MOST_PENDING)
        if self._interval is not None:
            self._interval.leave_out(time.perf_counter() - started)

    def close(self, step: int, complete: bool) -> None:
        """Waits for all scores of a complete run; ends the process of one that was stopped.

        Raises:
            DattnError: on rank 0, where scores cannot be written.
        """
        if complete:
            self._wait(0)
        if self._scoring is not None:
            self._scoring.stop()
            if self._scoring.problem is not None:
                raise self._scoring.problem

    def _wait(self, most: int) -> None:
        self._waits += 1
        self._watchdog.phase("waiting for scores", 0, "")
        try:
            if self._scoring is not None:
                self._scoring.wait(most)
        finally:
            wait_for_all(f"scores/{self._waits}")


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """Variables of the scoring process: those of this one, but for what makes it a rank."""
    # The same packages as here, wherever this process found them.
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return {
        **without_rank(given),
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": _THREADS,
        "TOKENIZERS_PARALLELISM": "false",
    }


def _why(done: _Process) -> str:
    """How a process ended that left no scores, in one line."""
    status = done.process.returncode
    if status < 0:
        return f"its process was killed by {signal.Signals(-status).name}"
    return _last_line(done.folder / LOG) or f"status {status}"


def _last_line(log: Path) -> str:
    try:
        return last_line(log.read_text("utf-8", "replace"))
    except OSError:
        return ""
