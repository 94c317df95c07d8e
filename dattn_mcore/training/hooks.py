"""What happens around the steps of a run: small classes in a list, which the loop calls."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dattn_mcore.config.schema import Config
from dattn_mcore.data.batch import GlobalBatch
from dattn_mcore.errors import CheckpointError, DattnError
from dattn_mcore.training.agreement import Agreement
from dattn_mcore.training.last_words import unexpected
from dattn_mcore.training.step import StepResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepDone:
    """A finished step.

    Attributes:
        step: 1-based number of the step.
        last_step: steps after which the run is complete.
        result: what it did.
        batch: this rank's part of the global batch.
        agreed: what the ranks exchanged before it.
        communication_share: of this rank's time in the step, where it was measured.
    """

    step: int
    last_step: int
    result: StepResult
    batch: GlobalBatch
    agreed: Agreement
    communication_share: float | None = None


class Hook:
    """Does nothing; a hook overrides what it needs. It is made just before the run's first step.

    Attributes:
        everywhere: every rank has this hook, and the ranks may talk to each other in it. An error
            in it ends the run on all ranks. One of a single rank (False) only reports: its error
            ends the run at the next exchange between the ranks.
    """

    everywhere = False

    def before_step(self, step: int) -> None:
        """Before the step with this 1-based number; its data are there."""

    def after_step(self, done: StepDone) -> DattnError | None:
        """After a step; returns the error that ends the run, if there is one."""

    def before_save(self, step: int) -> None:
        """Before the checkpoint of this step is written."""

    def after_save(self, step: int) -> None:
        """After it; an asynchronous save goes on beside training."""

    def saved(self, folder: Path) -> None:
        """A checkpoint is whole, on every rank."""

    def in_use(self) -> Collection[Path]:
        """Checkpoints that must not be deleted now, whatever `checkpoint.keep` is."""
        return ()

    def metrics(self, step: int) -> dict[str, float]:
        """What was measured of the weights after a step; their checkpoint's manifest keeps it."""
        return {}

    def state(self) -> dict[str, Any]:
        """What it remembers over a resume: plain values, the same on every rank."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes what `state` gave in the run that this one goes on from."""

    def close(self, step: int, complete: bool) -> None:
        """After the last step, or a stopping signal."""


class Hooks:
    """The hooks of this rank, in order.

    Args:
        hooks: those with `everywhere` stand in the same order on all ranks.
        config: the run's.
    """

    def __init__(self, hooks: Sequence[Hook], config: Config) -> None:
        self._hooks, self._config = tuple(hooks), config
        self._problem: DattnError | None = None  # of this rank alone, before a step

    def before_step(self, step: int) -> None:
        """Calls all hooks before a step; an error of this rank alone is told after it.

        Raises:
            DattnError: on every rank alike, from a hook that all ranks have.
        """
        for hook in self._hooks:
            if hook.everywhere:
                hook.before_step(step)
                continue
            found = self._alone(f"what comes before step {step}", hook.before_step, step)
            self._problem = self._problem or found

    def after_step(self, done: StepDone) -> DattnError | None:
        """Calls all hooks after a step.

        Returns:
            The first error of this rank alone; the others learn of it at the next exchange.

        Raises:
            DattnError: on every rank alike, from a hook that all ranks have.
        """
        problem = self._problem
        for hook in self._hooks:
            if hook.everywhere:
                found = hook.after_step(done)
            else:
                found = self._alone(f"reporting step {done.step}", hook.after_step, done)
            problem = problem or found
        return problem

    def _alone(
        self, doing: str, call: Callable[..., DattnError | None], *arguments: Any
    ) -> DattnError | None:
        """An error here must not keep this rank from what all ranks do together afterwards."""
        try:
            return call(*arguments)
        except DattnError as error:
            return error
        except OSError as error:
            return cannot_report(self._config, error)
        except Exception as error:  # noqa: BLE001 (a defect; the other ranks must know)
            return unexpected(error, doing, Path(self._config.log.run_dir))

    def before_save(self, step: int) -> None:
        """Calls all hooks before a checkpoint is written."""
        for hook in self._hooks:
            hook.before_save(step)

    def after_save(self, step: int) -> None:
        """Calls all hooks after it."""
        for hook in self._hooks:
            hook.after_save(step)

    def saved(self, folder: Path | None) -> None:
        """Calls all hooks when a checkpoint has become whole; None: none has."""
        if folder is not None:
            logger.info("saved %s", folder)
            for hook in self._hooks:
                hook.saved(folder)

    def in_use(self) -> set[Path]:
        """Checkpoints that a hook of this rank needs."""
        return {folder for hook in self._hooks for folder in hook.in_use()}

    def metrics(self, step: int) -> dict[str, float]:
        """What all hooks measured of the weights after a step."""
        return {name: value for hook in self._hooks for name, value in hook.metrics(step).items()}

    def state(self) -> dict[str, Any]:
        """What hooks remember over a resume, by the name of their class."""
        states = {type(hook).__name__: hook.state() for hook in self._hooks}
        return {name: state for name, state in states.items() if state}

    def restore(self, states: dict[str, Any]) -> None:
        """Gives each hook what it remembers."""
        for hook in self._hooks:
            if type(hook).__name__ in states:
                hook.restore(states[type(hook).__name__])

    def close(self, step: int, complete: bool) -> DattnError | None:
        """Calls all hooks at the end of the run.

        After one that fails those that all ranks have are called still, since ranks wait in them.

        Returns:
            The first error of this rank, which the others must learn of.
        """
        problem: DattnError | None = None
        for hook in self._hooks:
            if problem is None or hook.everywhere:
                found = self._alone("the end of the run", hook.close, step, complete)
                problem = problem or found
        return problem


def cannot_report(config: Config, error: OSError) -> CheckpointError:
    """The error that ends a run whose reports cannot be written, a full disk above all."""
    return CheckpointError(
        f"log.run_dir={config.log.run_dir}: reports cannot be written there "
        f"({error.strerror or error}); free space, or fix its permissions, and start again to go "
        "on from the newest checkpoint"
    )
