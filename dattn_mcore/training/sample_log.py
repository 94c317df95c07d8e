"""Which samples each step had: samples.jsonl, and a warning for those that are too long."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path

from dattn_mcore.config.schema import Config
from dattn_mcore.training.hooks import Hook, StepDone
from dattn_mcore.training.lines import drop_after, open_lines, read_lines

logger = logging.getLogger(__name__)
LEFT_OUT = ("skipped", "truncated", "masked")  # of a step's samples: counted over the run
_NAMED = 10  # samples over budget that are named in the log


class SampleLog(Hook):
    """Writes samples.jsonl on rank 0.

    Args:
        config: the run's.
        run_dir: its folder.
        first_step: step the run starts or resumes at.

    Attributes:
        counts: samples skipped, truncated and masked in the whole run.
    """

    def __init__(self, config: Config, run_dir: Path, first_step: int) -> None:
        self._config = config
        self._named: set[str] = set()
        self.counts: Counter[str] = Counter()
        path = run_dir / "samples.jsonl"
        drop_after(path, first_step)
        for done in read_lines(path):
            self.counts.update({what: len(done.get(what, ())) for what in LEFT_OUT})
        self._lines = open_lines(path)

    def after_step(self, done: StepDone) -> None:
        """Writes one line."""
        batch = done.batch
        left_out = {
            "skipped": [sample.id for sample in batch.skipped],
            "truncated": list(batch.truncated),
            "masked": [sample.id for sample in done.agreed.failures],
        }
        line = {"step": done.step, "ids": batch.sample_ids, "samples": batch.samples, **left_out}
        json.dump(line, self._lines)
        self._lines.write("\n")
        self.counts.update({what: len(ids) for what, ids in left_out.items()})
        for outcome in ("skipped", "truncated"):
            for sample_id in left_out[outcome]:
                self._warn(sample_id, outcome)
        if done.result.loss is None:
            logger.warning(
                "step %d has no supervised token (%d samples masked, %d skipped): no loss, and the "
                "weights stay as they are",
                done.step,
                len(left_out["masked"]),
                len(left_out["skipped"]),
            )

    def close(self, step: int, complete: bool) -> None:
        """Says how many samples were over budget."""
        for outcome in ("skipped", "truncated"):
            if self.counts[outcome]:
                logger.warning(
                    "%d samples over budget were %s; see samples.jsonl or raise data.text_budget",
                    self.counts[outcome],
                    outcome,
                )
        self._lines.close()

    def _warn(self, sample_id: str, outcome: str) -> None:
        if sample_id in self._named or len(self._named) >= _NAMED:
            return
        self._named.add(sample_id)
        data = self._config.data
        logger.warning(
            "sample %r is longer than data.text_budget=%d or data.visual_budget=%d and was %s "
            "(data.over_budget=%s)",
            sample_id,
            data.text_budget,
            data.visual_budget,
            outcome,
            data.over_budget,
        )
