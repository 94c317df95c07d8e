"""One line per interval for people, the same as JSON lines and TensorBoard for programs."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dattn_mcore.config.optim_groups import own_peaks
from dattn_mcore.config.schema import Config
from dattn_mcore.data.batch import GlobalBatch
from dattn_mcore.parallel import platform
from dattn_mcore.plan.hardware import peak_flops
from dattn_mcore.training.agreement import Agreement
from dattn_mcore.training.lines import drop_after, open_lines, read_lines
from dattn_mcore.training.step import StepResult
from dattn_mcore.units import duration, rate

logger = logging.getLogger(__name__)
_LEFT_OUT = ("skipped", "truncated", "masked")  # of a step's samples: counted over the run
WORTH_SAYING = 0.1  # share of the time spent waiting for data from which the line says so


def _number(value: float | None, form: str) -> str:
    return "none" if value is None else format(value, form)


def _learning_rates(config: Config, rates: dict[float, float]) -> dict[str, float]:
    """`lr`, and those of parts and groups with their own; `lr` is the first where all have one."""
    found = {name: rates[peak] for name, peak in own_peaks(config).items() if peak in rates}
    return {"lr": rates.get(config.optim.lr, next(iter(rates.values()))), **found}


def _further(row: dict[str, Any]) -> str:
    """What is worth a person's attention beside the rates."""
    parts = []
    if "mfu" in row:
        parts.append(f"MFU {row['mfu']:.1%}")
    if "peak_memory_gib" in row:
        parts.append(f"{row['peak_memory_gib']:.1f} GiB")
    if row["data_wait_share"] > WORTH_SAYING:
        parts.append(f"waits for data {row['data_wait_share']:.0%}")
    return "".join(f"  {part}" for part in parts)


class Reporter:
    """Counts what the run did and reports it. Exists on rank 0 only.

    Args:
        config: the run's configuration.
        run_dir: where metrics.jsonl and tensorboard/ go.
        first_step: step the run starts or resumes at.
        total_steps: step it ends at.
    """

    def __init__(self, config: Config, run_dir: Path, first_step: int, total_steps: int) -> None:
        self.config, self.total_steps = config, total_steps
        self.started = self.interval_started = time.perf_counter()
        self.first_step = self.interval_first_step = first_step
        self.counts: Counter[str] = Counter()
        self.interval: Counter[str] = Counter()
        self.data_wait, self.peak_memory = 0.0, 0  # seconds in this interval; bytes
        self.model_flops = 0.0
        fp8 = config.train.fp8 != "none"
        self.peak = peak_flops(platform.device_name(), "fp8" if fp8 else config.train.precision)
        self.seen_over_budget: set[str] = set()
        drop_after(run_dir / "metrics.jsonl", first_step)
        drop_after(run_dir / "samples.jsonl", first_step)
        for done in read_lines(run_dir / "samples.jsonl"):
            self.counts.update({what: len(done.get(what, ())) for what in _LEFT_OUT})
        self.metrics = open_lines(run_dir / "metrics.jsonl")
        self.samples = open_lines(run_dir / "samples.jsonl")
        self.tensorboard: Any = None
        if config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(
                str(run_dir / "tensorboard"), purge_step=first_step + 1
            )

    def step(
        self,
        step: int,
        result: StepResult,
        batch: GlobalBatch,
        agreed: Agreement,
        communication_share: float | None = None,
    ) -> None:
        """Notes a finished step; prints at the end of an interval.

        Args:
            step: 1-based number of the step.
            result: what it did.
            batch: the global batch it was done on.
            agreed: what the ranks exchanged before it.
            communication_share: of this rank's time in the step, where it was measured.
        """
        skipped = tuple(sample.id for sample in batch.skipped)
        masked = tuple(sample.id for sample in agreed.failures)
        self._note_over_budget(skipped, batch.truncated)
        if result.loss is None:
            logger.warning(
                "step %d has no supervised token (%d samples masked, %d skipped): no loss, and the "
                "weights stay as they are",
                step,
                len(masked),
                len(skipped),
            )
        self.counts["masked"] += len(masked)
        self.interval.update(
            samples=len(batch.sample_ids) - len(skipped) - len(masked),
            text=batch.text_tokens,
            visual=batch.visual_tokens,
        )
        self.model_flops += result.model_flops
        self.data_wait += agreed.data_wait
        self.peak_memory = agreed.peak_memory
        done = {
            "step": step,
            "ids": batch.sample_ids,
            "samples": batch.samples,
            "skipped": skipped,
            "truncated": batch.truncated,
            "masked": masked,
        }
        json.dump(done, self.samples)
        self.samples.write("\n")
        if step % self.config.log.interval and step != self.total_steps:
            return
        now = time.perf_counter()
        seconds = now - self.interval_started
        remaining = (self.total_steps - step) * seconds / (step - self.interval_first_step)
        row: dict[str, Any] = {
            "step": step,
            "loss": result.loss,
            **_learning_rates(self.config, result.rates),
            "grad_norm": result.grad_norm,
            "samples_per_second": self.interval["samples"] / seconds,
            "text_tokens_per_second": self.interval["text"] / seconds,
            "visual_tokens_per_second": self.interval["visual"] / seconds,
            "seconds_per_step": seconds / (step - self.interval_first_step),
            "data_wait_share": self.data_wait / seconds,
            "supervised_tokens": result.supervised_tokens,
            "skipped": self.counts["skipped"],
            "truncated": self.counts["truncated"],
            "masked": self.counts["masked"],
            "eta_seconds": remaining,
        }
        if self.peak_memory:
            row["peak_memory_gib"] = self.peak_memory / 2**30
        row["tflops_per_process"] = self.model_flops / seconds / dist.get_world_size() / 1e12
        if communication_share is not None:
            row["communication_share"] = communication_share
        if self.peak is not None:
            row["mfu"] = row["tflops_per_process"] * 1e12 / self.peak
        json.dump(row, self.metrics)
        self.metrics.write("\n")
        if self.tensorboard is not None:
            for name, value in row.items():
                if name != "step" and value is not None:
                    self.tensorboard.add_scalar(f"train/{name}", value, step)
        width = len(str(self.total_steps))
        logger.info(
            "step %*d/%d  loss %s  lr %.2e  grad %s  %s samples/s  "
            "%s text + %s visual tokens/s  ETA %s%s",
            width,
            step,
            self.total_steps,
            _number(result.loss, ".4f"),
            row["lr"],
            _number(result.grad_norm, ".2f"),
            rate(row["samples_per_second"]),
            rate(row["text_tokens_per_second"]),
            rate(row["visual_tokens_per_second"]),
            duration(remaining),
            _further(row),
        )
        self._new_interval(step, now)

    def restart_clock(self, step: int) -> None:
        """Leaves the time of a save out of the rates: the next interval starts here."""
        self._new_interval(step, time.perf_counter())

    def _new_interval(self, step: int, now: float) -> None:
        self.interval_started, self.interval_first_step = now, step
        self.interval.clear()
        self.data_wait = self.model_flops = 0.0

    def close(self, step: int) -> None:
        """Says how long it took and what was left out; closes the files."""
        logger.info(
            "%d steps in %s", step - self.first_step, duration(time.perf_counter() - self.started)
        )
        for outcome in ("skipped", "truncated"):
            if self.counts[outcome]:
                logger.warning(
                    "%d samples over budget were %s; see samples.jsonl or raise data.text_budget",
                    self.counts[outcome],
                    outcome,
                )
        self.metrics.close()
        self.samples.close()
        if self.tensorboard is not None:
            self.tensorboard.close()

    def _note_over_budget(self, skipped: tuple[str, ...], truncated: tuple[str, ...]) -> None:
        for outcome, ids in (("skipped", skipped), ("truncated", truncated)):
            self.counts[outcome] += len(ids)
            for sample_id in ids:
                if sample_id not in self.seen_over_budget and len(self.seen_over_budget) < 10:
                    self.seen_over_budget.add(sample_id)
                    logger.warning(
                        "sample %r is longer than data.text_budget=%d or data.visual_budget=%d "
                        "and was %s (data.over_budget=%s)",
                        sample_id,
                        self.config.data.text_budget,
                        self.config.data.visual_budget,
                        outcome,
                        self.config.data.over_budget,
                    )
