"""The held-out loss: every so many steps, and after the last one."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection

from dattn_mcore.config.schema import Config
from dattn_mcore.data.batch import GlobalBatch
from dattn_mcore.data.failures import mask
from dattn_mcore.data.sample_failure import SampleFailure
from dattn_mcore.data.validation import ValidationData
from dattn_mcore.errors import DattnError
from dattn_mcore.training.agreement import agree
from dattn_mcore.training.hooks import Hook, StepDone, cannot_report
from dattn_mcore.training.inputs import all_model_inputs
from dattn_mcore.training.interval import IntervalReport, by_source, mean
from dattn_mcore.training.last_words import unexpected
from dattn_mcore.training.memory import StepMemoryError, explain_memory
from dattn_mcore.training.sinks.sink import Row, Sink, Value
from dattn_mcore.training.step import run_schedule, sum_reports
from dattn_mcore.training.watchdog import Watchdog
from dattn_mcore.units import duration

logger = logging.getLogger(__name__)
_SECONDS_BETWEEN_LINES = 10.0


class Validation(Hook):
    """Runs the model over the held-out samples, on all ranks.

    Args:
        config: the run's.
        data: the samples.
        model: this stage's chunks.
        pg_collection: process groups.
        device: of this process.
        watchdog: of this process.
        sinks: where rows go, on rank 0; empty elsewhere.
        interval: whose rates leave the time of a pass out, on rank 0.
    """

    everywhere = True

    def __init__(
        self,
        config: Config,
        data: ValidationData,
        model: list[DistributedDataParallel],
        pg_collection: ProcessGroupCollection,
        *,
        device: torch.device,
        watchdog: Watchdog,
        sinks: list[Sink],
        interval: IntervalReport | None,
    ) -> None:
        self._config, self._data, self._model = config, data, model
        self._pg_collection, self._device, self._watchdog = pg_collection, device, watchdog
        self._sinks, self._interval = sinks, interval
        self._loss: float | None = None
        self._measured: int | None = None  # the step of that loss
        self._best: tuple[float, int] | None = None  # loss, step
        self._masked: set[int] = set()  # samples that were named in the log

    def after_step(self, done: StepDone) -> DattnError | None:
        """Measures the loss, when it is its turn; returns why it cannot be written, on rank 0."""
        interval = self._config.validation.interval
        due = interval is not None and done.step % interval == 0
        if not due and done.step != done.last_step:
            return None
        started = time.perf_counter()
        sums, num_samples = self._measure(done.step)
        self._loss = mean(sums[0])
        self._measured = done.step
        if self._loss is not None and not math.isfinite(self._loss):
            logger.warning("the held-out loss after step %d is %s", done.step, self._loss)
            self._loss = None
        if self._loss is not None and (self._best is None or self._loss < self._best[0]):
            self._best = (self._loss, done.step)
        values: dict[str, Value] = {
            "loss": self._loss,
            "best_loss": self._best[0] if self._best else None,
            "best_step": self._best[1] if self._best else None,
            **by_kind_and_source(self._data.groups, sums[1:]),
            "supervised_tokens": int(sums[0, 1]),
            "samples": num_samples,
            "seconds": time.perf_counter() - started,
        }
        if self._interval is not None:
            self._interval.leave_out(time.perf_counter() - started)
        try:
            for sink in self._sinks:
                sink.write(Row("validation", done.step, done.last_step, values))
        except OSError as error:  # of this rank alone: the others learn of it before the next step
            return cannot_report(self._config, error)
        return None

    def metrics(self, step: int) -> dict[str, float]:
        """`validation/loss`, where there was a pass after this step."""
        if self._loss is None or self._measured != step:
            return {}
        return {"validation/loss": self._loss}

    def state(self) -> dict[str, Any]:
        """The best loss so far, its step, and of which samples it is."""
        if self._best is None:
            return {}
        return {
            "best_loss": self._best[0],
            "best_step": self._best[1],
            "samples": self._data.fingerprint,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from an earlier start's best, if it is of the same samples."""
        if state.get("samples", self._data.fingerprint) != self._data.fingerprint:
            logger.warning(
                "the held-out samples are others than before; the best loss of %s was of step %d, "
                "and is counted anew from here",
                state["best_loss"],
                state["best_step"],
            )
            return
        self._best = (float(state["best_loss"]), int(state["best_step"]))

    def close(self, step: int, complete: bool) -> None:
        """Ends the threads of the data."""
        self._data.close()

    def _measure(self, step: int) -> tuple[torch.Tensor, int]:
        """Sums as `sum_reports` gives them, float64 [1 + groups, 3]; and samples seen."""
        total = torch.zeros(1 + len(self._data.groups), 3, dtype=torch.float64)
        limit = self._config.health.step_timeout_seconds, "health.step_timeout_seconds"
        started = said = time.monotonic()
        num_samples = 0
        for chunk in self._model:
            chunk.eval()
        try:
            for number in range(self._data.num_batches):
                self._watchdog.phase(f"the held-out loss after step {step}", *limit)
                batch, failures = self._batch(number, step)
                num_samples += len(batch.samples) - len(failures)
                total += self._sums_of(batch, failures, step)
                now = time.monotonic()
                if now - said > _SECONDS_BETWEEN_LINES:
                    said, share = now, (number + 1) / self._data.num_batches
                    left = duration((now - started) * (1 / share - 1))
                    logger.info(
                        "held-out loss after step %d: %.0f%%  ETA %s", step, 100 * share, left
                    )
        finally:
            self._data.end_pass()
            for chunk in self._model:
                chunk.train()
        return total, num_samples

    def _batch(self, number: int, step: int) -> tuple[GlobalBatch, Sequence[SampleFailure]]:
        """A batch, and its samples that any rank could not read.

        Raises:
            DataError: on every rank, what any rank ran into.
        """
        batch, problem = None, None
        try:
            batch = self._data.batch(number)
        except DattnError as error:
            problem = error
        except Exception as error:  # noqa: BLE001 (whatever a decoder or a file system comes up with)
            doing = f"loading held-out samples after step {step}"
            problem = unexpected(error, doing, Path(self._config.log.run_dir))
        agreed = agree(problem, self._device, failures=batch.failures if batch is not None else ())
        assert batch is not None  # a rank without one has a problem, which all ranks raise
        for failure in agreed.failures:
            if failure.sample not in self._masked:
                self._masked.add(failure.sample)
                logger.warning("left out of the held-out loss: %s", failure.reason)
        return batch, agreed.failures

    def _sums_of(
        self, batch: GlobalBatch, failures: Sequence[SampleFailure], step: int
    ) -> torch.Tensor:
        """Sums of one batch, over all ranks."""
        failed = {failure.sample for failure in failures}
        packs = [mask(item, failed) for item in batch.microbatches]
        inputs = all_model_inputs(packs, self._config, self._pg_collection, self._device)
        try:
            with torch.no_grad():
                reports = run_schedule(self._model, inputs, self._pg_collection, forward_only=True)
        except StepMemoryError as error:
            raise explain_memory(error, step, packs, inputs, self._config) from error
        sums, _ = sum_reports(reports, inputs[0])
        return sums.cpu()


def by_kind_and_source(groups: tuple[tuple[str, str], ...], sums: torch.Tensor) -> dict[str, Value]:
    """Mean losses of samples with images, of those of text alone, and of each source.

    Args:
        groups: (source, kind) of each group.
        sums: float64 [groups, 3], losses, supervised tokens and their weights.

    Returns:
        `loss/images` and `loss/text_only` where there are both; `loss/SOURCE` where there are
        several.
    """
    found: dict[str, Value] = {}
    for kind in ("images", "text_only"):
        own = sums[[n for n, group in enumerate(groups) if group[1] == kind]].sum(0)
        found[f"loss/{kind}"] = mean(own)
    if None in found.values():
        found = {}
    return {**found, **{k: v for k, v in by_source(groups, sums).items() if k.startswith("loss/")}}
