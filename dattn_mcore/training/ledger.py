"""What became of every sample: bad_samples.jsonl as a run goes, data_report.json at its end.

`bad_samples.jsonl` has a line for each sample that was not trained on when its turn came: id, path,
stage, reason and step (0: found when the index was made). `data_report.json` counts each sample of
each epoch once: trained, masked, skipped, unusable, or not reached.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from dattn_mcore.config.schema import Config
from dattn_mcore.data.failures import nothing_to_train, too_many, unusable
from dattn_mcore.data.index.store import Index
from dattn_mcore.data.pipeline import DataPipeline
from dattn_mcore.data.steps import Steps
from dattn_mcore.errors import DataError
from dattn_mcore.training.hooks import Hook, StepDone
from dattn_mcore.training.lines import drop_after, open_lines, read_lines

logger = logging.getLogger(__name__)
_SAID = 10  # samples that are named in the log


class SampleLedger(Hook):
    """Keeps account of samples. Exists on rank 0 only.

    Args:
        config: the run's; samples.jsonl of its folder says which samples each step had.
        data: the training data.
        first_step: step the run starts or resumes at.
    """

    def __init__(self, config: Config, data: DataPipeline, first_step: int) -> None:
        run_dir = Path(config.log.run_dir)
        self.run_dir, self.data, self.index = run_dir, data, data.index
        self.max_share, self.num_trainable = config.data.max_bad_share, data.num_trainable
        index = data.index
        self.path = run_dir / "bad_samples.jsonl"
        self.said = 0
        drop_after(self.path, first_step)
        kept = [line for line in read_lines(self.path) if line["step"] > 0]
        self.masked = {line["sample"] for line in kept if line["stage"] != "budget"}
        temporary = self.path.with_suffix(".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            for failure in unusable(index):
                file.write(json.dumps(failure.line(0)) + "\n")
            file.writelines(json.dumps(line) + "\n" for line in kept)
        os.replace(temporary, self.path)  # killed here, a run keeps what it knew
        self.lines = open_lines(self.path)
        if len(index) > index.num_usable:
            logger.warning(
                "%d of %d samples are unusable and left out; see %s",
                len(index) - index.num_usable,
                len(index),
                self.path,
            )

    def after_step(self, done: StepDone) -> DataError | None:
        """Notes what a step could not train on.

        Returns:
            The error that ends the run, if too many samples are bad by now.
        """
        step, batch, failures = done.step, done.batch, done.agreed.failures
        for failure in (*batch.skipped, *failures):
            self.lines.write(json.dumps(failure.line(step)) + "\n")
        for failure in failures:
            if self.said < _SAID:
                self.said += 1
                logger.warning("masked in step %d: %s", step, failure.reason)
        if not failures:
            return None
        self.masked |= {failure.sample for failure in failures}
        bad = len(self.index) - self.index.num_usable + len(self.masked)
        many = bad > self.max_share * len(self.index)
        if not many and len(self.masked) < self.num_trainable:
            return None
        # Several images of one sample may have failed; it is named once.
        named = {failure.sample: failure.reason for failure in reversed(failures)}
        reasons = list(named.values())[::-1][:3]
        left, where = bad - len(reasons), str(self.path)
        if many:
            return too_many(bad, len(self.index), self.max_share, reasons, left, where)
        return nothing_to_train(bad, len(self.index), reasons, left, where)

    def close(self, step: int, complete: bool) -> None:
        """Writes data_report.json and says what it counts."""
        self.lines.close()
        report = data_report(self.run_dir, self.index, self.data.steps, self.data.num_samples)
        if (held_out := self.data.held_out) is not None:
            report["held_out"] = int(held_out.validated.sum())
            report["withheld"] = int(held_out.withheld.sum())
        text = json.dumps(report, indent=1) + "\n"
        (self.run_dir / "data_report.json").write_text(text, encoding="utf-8")
        left_out = [name for name in ("masked", "skipped", "unusable") if report[name]]
        if left_out:
            logger.warning(
                "samples not trained on: %s; see data_report.json and bad_samples.jsonl",
                ", ".join(f"{report[name]} {name}" for name in left_out),
            )


def data_report(run_dir: Path, index: Index, steps: Steps, epoch_size: int) -> dict[str, Any]:
    """Counts what became of every sample of every epoch.

    Args:
        run_dir: the run's folder, with samples.jsonl and bad_samples.jsonl.
        index: of the data set.
        steps: positions of the order that each step took.
        epoch_size: samples an epoch draws (all that can be used, unless sources have weights).
    """
    bad: dict[tuple[int, int], str] = {}
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    for line in read_lines(run_dir / "bad_samples.jsonl"):
        outcome = {"budget": "skipped"}.get(line["stage"], "masked" if line["step"] else "unusable")
        if bad.setdefault((line["step"], line["sample"]), outcome) == outcome:
            reasons[outcome][line["stage"]] += 1
    num_unusable = len(index) - index.num_usable
    epochs: list[dict[str, int]] = []
    for line in read_lines(run_dir / "samples.jsonl"):
        first, _ = steps.bounds(line["step"] - 1)
        for position, sample in enumerate(line["samples"], start=first):
            while len(epochs) <= position // epoch_size:
                epochs.append(_epoch(len(epochs) + 1, num_unusable, epoch_size))
            epoch = epochs[position // epoch_size]
            epoch[bad.get((line["step"], sample), "trained")] += 1
            epoch["not_reached"] -= 1
    totals = {
        name: sum(epoch[name] for epoch in epochs) for name in ("trained", "masked", "skipped")
    }
    return {
        "samples": len(index),
        "usable": index.num_usable,
        "unusable": num_unusable,
        "samples_per_epoch": epoch_size,
        **totals,
        "epochs": epochs,
        "found_at": {outcome: dict(counts) for outcome, counts in reasons.items()},
    }


def _epoch(number: int, num_unusable: int, epoch_size: int) -> dict[str, int]:
    return {
        "epoch": number,
        "trained": 0,
        "masked": 0,
        "skipped": 0,
        "unusable": num_unusable,
        "not_reached": epoch_size,
    }
