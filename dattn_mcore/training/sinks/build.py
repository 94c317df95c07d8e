"""The sinks that a run's settings ask for, and what keeps a tracker's failure from the run."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Sequence

from dattn_mcore.config.schema import Config
from dattn_mcore.errors import ConfigError, first_line
from dattn_mcore.parallel.packages import import_problem
from dattn_mcore.training.sinks.console import ConsoleSink
from dattn_mcore.training.sinks.json_lines import JsonLinesSink
from dattn_mcore.training.sinks.run_facts import RunFacts
from dattn_mcore.training.sinks.sink import Example, Kind, Row, Sink

logger = logging.getLogger(__name__)
# The module of each tracker, and the package that brings it.
PACKAGES = {
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow-skinny"),
}


class GuardedSink:
    """A tracker whose failures are said once and never end a run.

    Args:
        name: of the tracker.
        make: opens it.
    """

    def __init__(self, name: str, make: Callable[[], Sink]) -> None:
        self._name = name
        self._sink: Sink | None = None
        with self._guarded("opened"):
            self._sink = make()

    def write(self, row: Row) -> None:
        """Passes a row on."""
        with self._guarded("written to"):
            if self._sink is not None:
                self._sink.write(row)

    def show(self, kind: Kind, step: int, examples: Sequence[Example]) -> None:
        """Passes examples on."""
        with self._guarded("written to"):
            if self._sink is not None:
                self._sink.show(kind, step, examples)

    def close(self) -> None:
        """Closes the tracker."""
        with self._guarded("closed"):
            if self._sink is not None:
                self._sink.close()

    @contextlib.contextmanager
    def _guarded(self, doing: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 (whatever a tracker or its network comes up with)
            self._sink = None
            logger.warning(
                "log.%s: the tracker cannot be %s (%s: %s); the run goes on without it, and its "
                "numbers stand in metrics.jsonl",
                self._name,
                doing,
                type(error).__name__,
                first_line(error),
            )


def build_sinks(config: Config, facts: RunFacts) -> list[Sink]:
    """Opens all sinks of a run, on rank 0.

    Args:
        config: a checked configuration.
        facts: of the run.

    Raises:
        OSError: the run's folder cannot be written.
    """
    sinks: list[Sink] = [ConsoleSink(), JsonLinesSink(facts.run_dir, facts.first_step)]
    for tracker in trackers_of(config):
        sinks.append(GuardedSink(tracker, functools.partial(_open, tracker, config, facts)))
    return sinks


def trackers_of(config: Config) -> list[str]:
    """The trackers that the settings ask for."""
    return [name for name in PACKAGES if getattr(config.log, name)]


def _open(tracker: str, config: Config, facts: RunFacts) -> Sink:
    # Each is imported only where it is asked for: two packages are optional, all slow to import.
    log = config.log
    if tracker == "tensorboard":
        from dattn_mcore.training.sinks.tensorboard import TensorBoardSink

        return TensorBoardSink(facts)
    if tracker == "wandb":
        from dattn_mcore.training.sinks.wandb import WandbSink

        return WandbSink(facts, log.project, log.wandb_server)
    from dattn_mcore.training.sinks.mlflow import MlflowSink

    return MlflowSink(facts, log.project, log.mlflow_server)


def check_trackers(config: Config) -> None:
    """Refuses a tracker whose package is absent or broken, before anything is built.

    Raises:
        ConfigError: names the package.
    """
    for tracker in trackers_of(config):
        module, package = PACKAGES[tracker]
        if problem := import_problem(module):
            raise ConfigError(
                f"log.{tracker}=true needs the package {module}, which {problem}; run pip install "
                f"{package}, or set it to false"
            )
