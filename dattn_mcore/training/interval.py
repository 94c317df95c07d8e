"""What the steps of an interval did, as one row of numbers: losses, rates, times."""

from __future__ import annotations

import logging
import time

import torch
import torch.distributed as dist

from dattn_mcore.config.optim_groups import own_peaks
from dattn_mcore.config.schema import Config
from dattn_mcore.parallel import platform
from dattn_mcore.plan.hardware import peak_flops
from dattn_mcore.training.hooks import Hook, StepDone
from dattn_mcore.training.part_norms import PartNorms
from dattn_mcore.training.sample_log import LEFT_OUT, SampleLog
from dattn_mcore.training.sinks.sink import Row, Sink, Value
from dattn_mcore.units import duration

logger = logging.getLogger(__name__)


class IntervalReport(Hook):
    """Adds up steps, and gives the sinks a row every `log.interval` steps; on rank 0.

    Args:
        config: the run's.
        sinks: where rows go; closed with the run.
        samples: counts what was left out.
        groups: (source, kind) of each group of samples.
        parts: measures each part of the model; it stands before this hook.
        first_step: step the run starts or resumes at.
    """

    def __init__(
        self,
        config: Config,
        sinks: list[Sink],
        samples: SampleLog,
        groups: tuple[tuple[str, str], ...],
        parts: PartNorms,
        first_step: int,
    ) -> None:
        self._config, self._sinks, self._samples = config, sinks, samples
        self._parts = parts
        self._groups, self._first_step = groups, first_step
        fp8 = config.train.fp8 != "none"
        self._peak = peak_flops(platform.device_name(), "fp8" if fp8 else config.train.precision)
        self._run_started = time.perf_counter()
        self._by_group = torch.zeros(len(groups), 3, dtype=torch.float64)
        self._begin(first_step)

    def after_step(self, done: StepDone) -> None:
        """Counts the step; writes the row at the end of an interval."""
        batch, result = done.batch, done.result
        left_out = len(batch.skipped) + len(done.agreed.failures)
        self._num_samples += len(batch.sample_ids) - left_out
        self._text += batch.text_tokens
        self._visual += batch.visual_tokens
        self._flops += result.model_flops
        self._data_wait += done.agreed.data_wait
        if result.by_group is not None:
            self._by_group += result.by_group
        if done.step % self._config.log.interval and done.step != done.last_step:
            return
        row = Row("train", done.step, done.last_step, self._values(done))
        for sink in self._sinks:
            sink.write(row)
        self._begin(done.step)
        self._by_group.zero_()

    def leave_out(self, seconds: float) -> None:
        """Leaves time out of the rates in which nothing was trained."""
        self._started += seconds

    def after_save(self, step: int) -> None:
        """Leaves the time of a save out of the rates: the next interval starts here."""
        self._begin(step)

    def close(self, step: int, complete: bool) -> None:
        """Says how long the run took; closes the sinks."""
        seconds = time.perf_counter() - self._run_started
        logger.info("%d steps in %s", step - self._first_step, duration(seconds))
        for sink in self._sinks:
            sink.close()

    def _begin(self, step: int) -> None:
        self._started, self._since = time.perf_counter(), step
        self._num_samples = self._text = self._visual = 0
        self._data_wait = self._flops = 0.0

    def _values(self, done: StepDone) -> dict[str, Value]:
        """The row: names of the metrics and their values."""
        result = done.result
        seconds = time.perf_counter() - self._started
        per_step = seconds / (done.step - self._since)
        values: dict[str, Value] = {
            "loss": result.loss,
            **learning_rates(self._config, result.rates),
            "grad_norm": result.grad_norm,
            "samples_per_second": self._num_samples / seconds,
            "text_tokens_per_second": self._text / seconds,
            "visual_tokens_per_second": self._visual / seconds,
            "seconds_per_step": per_step,
            "data_wait_share": self._data_wait / seconds,
            "supervised_tokens": result.supervised_tokens,
            **{what: self._samples.counts[what] for what in LEFT_OUT},
            "eta_seconds": (done.last_step - done.step) * per_step,
        }
        if done.agreed.peak_memory:
            values["peak_memory_gib"] = done.agreed.peak_memory / 2**30
        per_process = self._flops / seconds / dist.get_world_size()
        values["tflops_per_process"] = per_process / 1e12
        if done.communication_share is not None:
            values["communication_share"] = done.communication_share
        if self._peak is not None:
            values["mfu"] = per_process / self._peak
        return {**values, **self._parts.values(), **by_source(self._groups, self._by_group)}


def by_source(groups: tuple[tuple[str, str], ...], sums: torch.Tensor) -> dict[str, Value]:
    """Mean loss of each source and its share of the supervised tokens.

    Args:
        groups: (source, kind) of each group.
        sums: float64 [groups, 3], losses, supervised tokens and their weights.

    Returns:
        `loss/SOURCE` and `token_share/SOURCE`; nothing where there is one source only.
    """
    sources = list(dict.fromkeys(source for source, _ in groups))
    if len(sources) < 2:
        return {}
    found: dict[str, Value] = {}
    tokens = float(sums[:, 1].sum())
    for source in sources:
        own = sums[[n for n, group in enumerate(groups) if group[0] == source]].sum(0)
        found[f"loss/{source}"] = mean(own)
        found[f"token_share/{source}"] = float(own[1]) / tokens if tokens else None
    return found


def mean(sums: torch.Tensor) -> float | None:
    """Mean of (weighted sum, count, sum of weights); None where nothing was counted."""
    return float(sums[0] / sums[2]) if sums[1] else None


def learning_rates(config: Config, rates: dict[float, float]) -> dict[str, Value]:
    """`lr`, and those of parts and groups with their own; `lr` is the first where all have one."""
    found = {name: rates[peak] for name, peak in own_peaks(config).items() if peak in rates}
    return {"lr": rates.get(config.optim.lr, next(iter(rates.values()))), **found}
