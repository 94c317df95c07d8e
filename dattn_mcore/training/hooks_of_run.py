"""The hooks of a run, in order: one line for each."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from dattn_mcore.config.load import to_yaml
from dattn_mcore.config.schema import Config
from dattn_mcore.config.scores_rules import asks
from dattn_mcore.data.index.identity import fingerprint_of
from dattn_mcore.data.pipeline import DataPipeline
from dattn_mcore.data.validation import ValidationData
from dattn_mcore.errors import DattnError
from dattn_mcore.training.agreement import agree
from dattn_mcore.training.ema import Ema
from dattn_mcore.training.export_beside import ExportBeside
from dattn_mcore.training.hooks import Hook, Hooks, cannot_report
from dattn_mcore.training.interval import IntervalReport
from dattn_mcore.training.last_words import unexpected
from dattn_mcore.training.ledger import SampleLedger
from dattn_mcore.training.part_norms import PartNorms
from dattn_mcore.training.profile import profile_hooks
from dattn_mcore.training.sample_log import SampleLog
from dattn_mcore.training.scores import ScoreCheckpoints, WaitForScores
from dattn_mcore.training.sinks.build import build_sinks
from dattn_mcore.training.sinks.run_facts import facts_of
from dattn_mcore.training.sinks.sink import Sink
from dattn_mcore.training.validation import Validation
from dattn_mcore.training.watchdog import Watchdog

FINISHED = "finished.json"  # in the run folder after the last step: for whoever starts runs again


class Finished(Hook):
    """Leaves a file in the run's folder when it is complete.

    Args:
        run_dir: the folder.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / FINISHED

    def close(self, step: int, complete: bool) -> None:
        """Writes it."""
        if complete:
            self._path.write_text(json.dumps({"step": step}), encoding="utf-8")


def build_hooks(
    config: Config,
    data: DataPipeline,
    held_out: ValidationData | None,
    model: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    pg_collection: ProcessGroupCollection,
    *,
    ema: Ema | None,
    device: torch.device,
    watchdog: Watchdog,
    first_step: int,
    last_step: int,
) -> Hooks:
    """Opens what reports and measures; called by all ranks.

    Args:
        config: a checked configuration.
        data: this rank's training data.
        held_out: this rank's held-out data, where the run has some.
        model: this stage's chunks.
        optimizer: of these.
        pg_collection: process groups.
        ema: the running mean of the weights, where the run has one.
        device: of this process.
        watchdog: of this process.
        first_step: step the run starts or resumes at.
        last_step: steps after which the run is complete.

    Raises:
        DattnError: on every rank, what any rank ran into.
    """
    parts = PartNorms(
        optimizer,
        model,
        pg_collection,
        device=device,
        interval=config.log.interval,
        last_step=last_step,
        updates=config.log.update_ratio,
    )
    profiles = profile_hooks(
        config,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        first_step=first_step,
        last_step=last_step,
        device="cpu" if device.type == "cpu" else "gpu",
    )
    reports = _Reports()
    problem: DattnError | None = None
    run_dir = Path(config.log.run_dir)
    try:
        if dist.get_rank() == 0:
            reports = _open_reports(config, data, parts, first_step, last_step)
    except DattnError as error:
        problem = error
    except OSError as error:
        problem = cannot_report(config, error)
    except Exception as error:  # noqa: BLE001 (the other ranks must know)
        problem = unexpected(error, "opening the reports", run_dir)
    agree(problem, device)
    hooks: list[Hook] = [*profiles, parts]
    if ema is not None:
        hooks.append(ema)
    if asks(config):  # in front of those that close the sinks
        scoring = reports.scoring
        waiting = WaitForScores(config, scoring, watchdog, reports.interval, last_step)
        hooks += [waiting] if scoring is None else [scoring, waiting]
    hooks += reports.hooks
    if held_out is not None:
        hooks.append(
            Validation(
                config,
                held_out,
                model,
                pg_collection,
                device=device,
                watchdog=watchdog,
                sinks=reports.sinks,
                interval=reports.interval,
            )
        )
    if config.checkpoint.also_export:
        hooks.append(ExportBeside(run_dir, watchdog))
    if dist.get_rank() == 0:
        hooks.append(Finished(run_dir))
    return Hooks(hooks, config)


@dataclass
class _Reports:
    """What reports on the first rank; empty on the others.

    Attributes:
        hooks: in order.
        sinks: where rows go.
        interval: the one of the hooks whose rates leave time out.
        scoring: scores checkpoints, where they are scored; not one of the hooks.
    """

    hooks: list[Hook] = field(default_factory=list)
    sinks: list[Sink] = field(default_factory=list)
    interval: IntervalReport | None = None
    scoring: ScoreCheckpoints | None = None


def _open_reports(
    config: Config, data: DataPipeline, parts: PartNorms, first_step: int, last_step: int
) -> _Reports:
    """Opens them.

    Raises:
        DattnError: what a tracker or a report needs is missing.
        OSError: the run's folder cannot be written.
    """
    run_dir = Path(config.log.run_dir)
    (run_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    fingerprint = fingerprint_of(data.identity)
    facts = facts_of(config, first_step=first_step, data_fingerprint=fingerprint)
    sinks = build_sinks(config, facts)
    samples = SampleLog(config, run_dir, first_step)
    interval = IntervalReport(config, sinks, samples, data.groups, parts, first_step)
    scoring = ScoreCheckpoints(config, sinks, first_step, last_step) if asks(config) else None
    hooks: list[Hook] = [samples, interval, SampleLedger(config, data, first_step)]
    return _Reports(hooks, sinks, interval, scoring)
